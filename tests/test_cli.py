import io
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from rich.console import Console
from terminal import ARM, MODEL, fails, qcompile

from qcompiler.cli.console import Terminal
from qcompiler.cli.figures import size, span

pytestmark = pytest.mark.usefixtures("empty_folder")


# The program as a whole


def test_help_shows_options_and_verbs():
    for args in ((), ("--help",), ("-h",), (MODEL, "--help"), ("--target", "x86-int8", "-h")):
        result = qcompile(*args)
        assert result.exit_code == 0
        for word in ("MODEL --target", "--keep-float", "inspect", "bench", "--version"):
            assert word in result.stdout


@pytest.mark.parametrize("verb", ["targets", "inspect", "bench", "compare", "pass", "take-weights"])
def test_help_of_a_verb(verb):
    result = qcompile(verb, "--help")
    assert result.exit_code == 0
    assert f"qcompile {verb}" in result.stdout
    assert "--json" in result.stdout


def test_version():
    assert qcompile("--version").stdout.startswith("qcompile ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["inspct", "x"], "'inspct' is neither a file nor a verb; did you mean 'inspect'?"),
        (["frobnicate"], "the verbs are targets, inspect, bench, compare, pass, take-weights"),
        ([MODEL, "--targt", "x86-int8"], "No such option '--targt'"),
        (["bench", "b", "--agaisnt", "m"], "Did you mean '--against'?"),
        ([MODEL, *ARM, "--target", "x86-int8"], "--target is given twice: leave one out"),
        (["bench", "b", "--seconds=1", "--seconds", "2"], "--seconds is given twice"),
        (["compare", "m", "b", "--native", "--no-native"], "--native is given twice"),
        ([MODEL], "Missing option '--target'. Choose from: x86-int8, x86-int4, arm-int8"),
        (["--target", "x86-int8"], "Missing argument 'MODEL'"),
        ([MODEL, "extra", "--target", "x86-int8"], "unexpected extra argument (extra)"),
        (["inspect"], "Missing argument 'MODEL|BUNDLE'"),
        (["targets", "extra"], "unexpected extra argument (extra)"),
    ],
)
def test_usage_errors(args, message):
    fails(2, message, *args)


def test_usage_errors_say_where_to_look():
    assert "'qcompile bench --help' shows" in qcompile("bench", "x").stderr
    assert "'qcompile bench --help' shows" in qcompile("bench", "x", "--against").stderr
    assert "'qcompile --help' shows" in qcompile(MODEL).stderr


def test_start_is_light():
    code = "import qcompiler.cli.app, sys; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numpy", "onnx", "onnx_ir", "onnxruntime", "tvm", "torch"} & {*done.stdout.split()}


@pytest.mark.parametrize("module", ["qcompiler", "qcompiler.cli"])
def test_module_is_the_program(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "inspct"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: 'inspct'")


def test_broken_pipe_is_silent():
    command = f'"{sys.executable}" -m qcompiler.cli targets --json | true'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(
    "args", [("targets", "--json"), ("pass", "--list"), ("--help",), ("--version",)]
)
def test_a_full_disk_is_no_bug_of_ours(args):
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "qcompiler", *args], env=buffered,
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    message = "error: standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, message)


@pytest.mark.parametrize(
    ("words", "index", "expected"),
    [
        ("qcompile be", 1, "plain,bench"),
        ("qcompile m.onnx --tar", 2, "plain,--target"),
        ("qcompile m.onnx --target x", 3, "plain,x86-int8"),
    ],
)
def test_shell_completion(words, index, expected):
    environment = os.environ | {
        "_QCOMPILE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(index)
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "qcompiler.cli"],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    assert expected in done.stdout


def raising(monkeypatch, error: BaseException) -> None:
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("qcompiler.job.build_kernels", fail)


def test_internal_error(monkeypatch):
    raising(monkeypatch, ZeroDivisionError("one [bold] over nothing"))
    result = qcompile(MODEL, *ARM)
    assert result.exit_code == 70
    assert "internal error: ZeroDivisionError: one [bold] over nothing\n" in result.stderr
    assert "run again with -v for the traceback; please report it" in result.stderr
    assert "Traceback" not in result.stderr
    assert not os.listdir()


def test_verbose_internal_error(monkeypatch):
    raising(monkeypatch, ZeroDivisionError("x"))
    result = qcompile(MODEL, *ARM, "-v")
    assert result.exit_code == 70
    assert "Traceback" in result.stderr
    assert "run again" not in result.stderr


def test_verbose_error_shows_its_cause():
    Path("bad.onnx").write_bytes(b"garbage")
    result = qcompile("bad.onnx", "--target", "x86-int8", "-v")
    assert result.exit_code == 1
    assert "The above exception was the direct cause" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: bad.onnx")


def test_interrupt_leaves_nothing_behind(monkeypatch):
    raising(monkeypatch, KeyboardInterrupt())
    result = qcompile(MODEL, *ARM)
    assert result.exit_code == 130
    assert result.stderr.endswith("error: interrupted\n")
    assert not os.listdir()


def test_out_of_memory(monkeypatch):
    raising(monkeypatch, MemoryError())
    fails(1, "out of memory", MODEL, *ARM)


def test_warnings_are_one_line(monkeypatch):
    def build(*_, **__):
        warnings.warn("mind\n the gap", stacklevel=1)

    monkeypatch.setattr("qcompiler.job.build_kernels", build)
    stderr = qcompile(MODEL, *ARM).stderr
    assert "warning: mind the gap\n" in stderr
    assert "test_cli.py" not in stderr


def test_a_terminal_gets_a_bar_after_a_while(monkeypatch):
    monkeypatch.setattr("qcompiler.cli.progress._BAR_AFTER", 0.05)
    terminal = Terminal()
    terminal.err = Console(file=io.StringIO(), force_terminal=True, width=80)
    with terminal.progress() as update:
        update("quick", 0, 2)
    assert "quick" not in terminal.err.file.getvalue()
    with terminal.progress() as update:
        update("kernels: a rather long name of a kernel that is compiled now", 1, 2)
        time.sleep(0.3)
    drawn = terminal.err.file.getvalue()
    assert "kernels: a rather" in drawn


# qcompile MODEL


# qcompile targets


def test_targets(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    result = qcompile("targets", "-v")
    assert result.exit_code == 0, result.output
    flat = " ".join(result.stdout.split())
    assert "arm-int8 int8 per channel int8 per token int8, uint8 static none yet" in flat
    assert "cuda-int4 int4, groups of 128 float" in flat
    assert "cuda-int8 sm_90a, sm_89, sm_80" in flat
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, qcompile("targets", "-v").stdout.splitlines())) <= 80


def test_targets_as_json():
    found = json.loads(qcompile("targets", "--json").stdout)
    by_name = {target["target"]: target for target in found["targets"]}
    assert by_name["x86-int8"]["built_isa"][0] in by_name["x86-int8"]["planned_isa"]
    assert by_name["arm-int8"]["built_isa"] == []
    assert not by_name["arm-int8"]["runs_native"]
    assert by_name["cuda-fp8"]["weights"] == "e4m3 per channel"
    assert "CPUExecutionProvider" in found["here"]["providers"]


def test_targets_without_a_linker(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "Linker none: pip install" in " ".join(qcompile("targets").stdout.split())


# Figures


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (91_017_094, "91.0 MB"), (3e9, "3.00 GB")],
)
def test_size(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(125, "125 s"), (1.5, "1.50 s"), (0.0169, "16.9 ms"), (8.2e-5, "82.0 µs"), (0, "0.00 µs")],
)
def test_span(seconds, text):
    assert span(seconds) == text
