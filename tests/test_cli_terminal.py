"""Streams, widths, interrupts and missing packages: what surrounds a command."""

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from terminal import ARM, CALIB, MODEL, TEST, fails, qcompile

import qcompiler
from qcompiler.cli.decisions import decision_table
from qcompiler.cli.figures import FigureTable
from qcompiler.cli.progress import progress_bar
from qcompiler.ir.region import Region, Step
from qcompiler.report import Group, op_in_words

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture(autouse=True)
def _interrupts_are_heard():
    """As in a terminal: what a shell runs in the background is started with them ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def process(*args: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    """The outcome of a command line in a process of its own."""
    command = [sys.executable, "-m", "qcompiler", *args]
    return subprocess.run(command, capture_output=True, check=False, **options)


# Streams


def test_ascii_needs_no_more_than_ascii():
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = process(MODEL, *ARM, "-o", "bündel", env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert b"-> b?ndel" in done.stdout
    done = process(MODEL, *ARM, "-o", "bündel", "--json", env=ascii_only)
    assert json.loads(done.stdout)["bundle"] == "bündel"
    done = process("bench", "bündel", "--against", MODEL, "--seconds", "0.01", "--threads", "1",
                   env=ascii_only)  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed):
    command = f'"{sys.executable}" -m qcompiler "{MODEL}" {" ".join(ARM)} -o b {closed}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert Path("b/model.onnx").is_file()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_stderr_changes_nothing():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "qcompiler", MODEL, *ARM, "-o", "b"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, check=False)
    assert done.returncode == 0
    assert b"Bundle" in done.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("words", [["--help"], ["targets", "--help"], ["targets"]])
def test_a_full_stdout_is_named(words):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "qcompiler", *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert re.fullmatch(rb"error: standard output\b.*: No space left on device\n", done.stderr)


# Interrupts


def interrupt(*_, **__) -> None:
    """What TVM makes of Ctrl-C."""
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    except KeyboardInterrupt:
        raise RuntimeError from None


def test_an_interrupt_that_became_another_error(monkeypatch):
    monkeypatch.setattr("qcompiler.job.build_kernels", interrupt)
    result = qcompile(MODEL, *ARM)
    assert result.exit_code == 130
    assert result.stderr.endswith("error: interrupted\n")
    assert not os.listdir()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_that_was_swallowed(monkeypatch):
    def build(*_, **__):
        with pytest.raises(RuntimeError):
            interrupt()

    monkeypatch.setattr("qcompiler.job.build_kernels", build)
    assert qcompile(MODEL, *ARM, "-q").exit_code == 130


def test_an_interrupt_while_modules_are_imported():
    code = (
        "import os, signal, sys, time\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'rich_click':\n"
        "            try:\n"
        "                os.kill(os.getpid(), signal.SIGINT)\n"
        "                time.sleep(9)\n"
        "            except KeyboardInterrupt:\n"
        "                pass  # as native code may do\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from qcompiler.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


# Missing packages


def without(package: str, *args: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.modules[{package!r}] = None; from qcompiler.cli import main; main()"
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("package", ["rich_click", "rich", "onnx_ir"])
def test_a_missing_package_is_one_line(package):
    done = without(package, "inspect", MODEL)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: the Python package {package!r} is not installed")
    assert "pip install 'qcompiler[cpu,zig]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_compiling_without_onnxruntime_fails_at_once():
    done = without("onnxruntime", MODEL, *ARM)
    message = "error: ONNX Runtime is not installed: pip install 'qcompiler[cpu]' (or [cuda])\n"
    assert (done.returncode, done.stderr) == (1, message)
    assert not os.listdir()
    done = without("onnxruntime", "targets")
    assert done.returncode == 0
    assert re.search(r"ONNX Runtime +ONNX Runtime is not installed: pip install", done.stdout)


def test_an_old_onnxruntime_fails_at_once(monkeypatch):
    monkeypatch.setattr("onnxruntime.__version__", "1.22.1")
    fails(1, "ONNX Runtime 1.22.1 is too old, 1.23 or newer is needed", MODEL, *ARM)
    assert "1.22.1 is too old" in " ".join(qcompile("targets").stdout.split())


# Widths

NAME = "present.11.decoder.value"


def figures_at(width: int) -> str:
    table = FigureTable("Output", ">Values", ">SQNR", ">Max\nerror", droppable=["Values"])
    table.add_row(NAME, "1,234,567", "38.0 dB", "0.446")
    table.add_row("y", "1", "equal", "0")
    console = Console(file=io.StringIO(), width=width, markup=False)
    console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [100, 60, 50, 43, 30, 20])
def test_figures_are_never_cropped(width):
    text = figures_at(width)
    assert max(map(len, text.splitlines())) <= width
    assert ("1,234,567" in text) != (43 <= width < 60 - 6)
    for figure in ("38.0 dB", "0.446", "equal"):
        assert figure in text
    assert NAME in "".join(text.split())


def test_a_table_stacks_where_columns_do_not_fit():
    assert [line.split() for line in figures_at(38).splitlines()] == [
        ["Output", NAME], ["Values", "1,234,567"], ["SQNR", "38.0", "dB"],
        ["Max", "error", "0.446"], [], ["Output", "y"], ["Values", "1"],
        ["SQNR", "equal"], ["Max", "error", "0"],
    ]  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("widths") / "digits.arm-int8"
    qcompiler.compile(MODEL, "arm-int8", path, recipe=qcompiler.Recipe(keep_float=("Conv",)))
    return path


@pytest.mark.parametrize("columns", [80, 60, 40])
def test_every_screen_shows_whole_figures(bundle, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    screens = {
        "bench": qcompile("bench", bundle, "--against", MODEL, "--seconds", 0.02, "--threads", 1),
        "compare": qcompile("compare", MODEL, bundle, "--data", TEST, "--labels", "label"),
        "inspect": qcompile("inspect", bundle),
        "targets": qcompile("targets"),
        "compile": qcompile(MODEL, *ARM, "-o", "b"),
    }
    for name, screen in screens.items():
        assert screen.exit_code == 0, screen.output
        lines = [line for line in screen.stdout.splitlines() if "qcompile " not in line]
        assert max(map(len, lines)) <= columns, name
    assert re.search(r"\d\.\d\d-\d+\.\d\dx\b", screens["bench"].stdout)
    assert re.search(r"\d\.\d\dx\b", screens["bench"].stdout)
    for figure in (r"\d\d\.\d dB", r"98\.70%", r"9\d\.\d\d%"):
        assert re.search(figure, screens["compare"].stdout)
    assert re.search(r"\d\.\d (kB|MB)\b", screens["inspect"].stdout)
    assert "avx512-vnni" in screens["targets"].stdout


def test_all_of_bench_fits_80_columns(bundle, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = qcompile("bench", bundle, "--against", MODEL, "--seconds", 0.02, "--threads", 1)
    assert "middle 50%" in result.stdout
    assert "Runs" in result.stdout


# Words


def test_reasons_are_in_plain_words():
    table = decision_table([
        Group("Quantize", "kernel", "outlined", 5),
        Group("QMatMulW8A8 + AddC + AddT + Gelu", "kernel", "fused with Add + Add + Gelu", 2),
        Group("QMatMulW8A8 + MulC + AddR", "kernel", "fused with Mul + Add", 1),
    ])  # fmt: skip
    console = Console(file=io.StringIO(), width=100, markup=False)
    console.print(table)
    flat = " ".join(console.file.getvalue().split())
    assert "5 our kernel Quantize by itself" in flat
    assert "QMatMulW8A8 + Add per channel + Add + Gelu fused with" in flat
    assert "QMatMulW8A8 + Mul per channel + Add fused with" in flat


def test_ops_are_named_without_their_sizes():
    sizes = (("K", 192), ("N", 8), ("R", 3), ("S", 2))
    steps = (Step("Add", (0, -1)), Step("Gelu", (1,)))
    windowed = Region("WindowedQMatMulW8A8", sizes, ("channel",), steps)
    assert op_in_words(windowed.name) == "WindowedQMatMulW8A8 + AddC + Gelu"
    requantized = Region("RequantizedQMatMulW8A8", sizes[:2], outputs=("y", "yq", "ys"))
    smoothed = dataclasses.replace(requantized, extras=("channel",), flags=("smoothed",))
    assert {op_in_words(r.name) for r in (requantized, smoothed)} == {"RequantizedQMatMulW8A8"}


def test_compare_tells_its_stages_and_nothing_else():
    told = qcompile("compare", MODEL, MODEL, "--data", CALIB).stderr
    assert [line.split("s  ")[1] for line in told.splitlines()] == ["the outputs"]
    assert qcompile("compare", MODEL, MODEL, "--data", CALIB, "-q").stderr == ""


# Progress


def test_time_left_is_hidden_once_it_was_wrong(monkeypatch):
    monkeypatch.setattr("qcompiler.cli.progress._BAR_AFTER", 0.0)
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with progress_bar(console) as update:
        update("load", 0, 4)
        time.sleep(0.2)
        update("fold", 1, 4)
        time.sleep(0.2)
        update("kernels", 2, 4)
        time.sleep(0.7)
        assert "left 0:00:0" in console.file.getvalue()
        console.file.truncate(0)
        time.sleep(0.8)
        update("kernels: link", 2, 4)
        console.file.truncate(0)
        time.sleep(0.7)
        assert "kernels: link" in console.file.getvalue()
        assert "left" not in console.file.getvalue()
