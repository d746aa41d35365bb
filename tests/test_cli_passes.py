"""Passes on the command line: by name, with options, up to a stage, with samples, and watched."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from terminal import ARM, CALIB, MODEL, fails, qcompile

from qcompiler.cli.passes import _SAMPLED
from qcompiler.pass_docs import document
from qcompiler.pipeline import Pipeline

pytestmark = pytest.mark.usefixtures("empty_folder")

FLOATS = "canonicalize..fuse-gelu"


def ops(path):
    return {node.op_type for node in onnx.load(path).graph.node}


def test_the_list_tells_the_options():
    flat = " ".join(qcompile("pass", "--list").stdout.split())
    assert "assign-precision{group_size} integer Weights per scale where" in flat
    found = json.loads(qcompile("pass", "--list", "--json").stdout)["passes"]
    (smooth,) = (entry for entry in found if entry["name"] == "smooth-activations")
    assert smooth["options"][0] | {"help": ""} == {
        "name": "alpha", "type": "number,…", "default": "0.25,0.375,0.5,0.625,0.75,1.0", "help": "",
    }  # fmt: skip


def test_passes_by_name_or_by_option():
    assert qcompile("pass", "canonicalize,fold-qdq", MODEL, "a.onnx").exit_code == 0
    result = qcompile("pass", MODEL, "b.onnx", "--pipeline", "canonicalize+fold-qdq")
    assert result.exit_code == 0, result.output
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()


def test_a_pass_with_an_option():
    text = "..assign-precision,insert-qdq,round-to-nearest"
    kept = text.replace("precision", "precision{keep_float=Conv,Mat*}")
    for passes, quantized in ((text, True), (kept, False)):
        result = qcompile("pass", passes, MODEL, "o.onnx", "--target", "arm-int8", "--calib", CALIB)
        assert result.exit_code == 0, result.output
        assert ("QuantizeLinear" in ops("o.onnx")) == quantized


@pytest.mark.parametrize("name", ["equalize-layers", "bias-correction", "keep-sensitive"])
def test_a_pass_that_measures_takes_samples(name):
    passes = f"..assign-precision,{name}"
    result = qcompile("pass", passes, MODEL, "o.onnx", "--target", "arm-int8", "--calib", CALIB)
    assert result.exit_code == 0, result.output


def test_every_pass_that_looks_at_samples_is_known_to():
    steps = Pipeline.default("arm-int8")
    looking = {s.name for s in steps if vars(s.rewrite).keys() & {"run", "observe", "sample"}}
    assert "convert-float16" in looking
    assert looking <= set(_SAMPLED)


def test_stopping_after_a_stage():
    text = ("pass", "..", MODEL, "o.onnx", "--target", "arm-int8", "--calib", CALIB)
    result = qcompile(*text, "--stop-after", "qdq", "--json")
    passes = [row["pass"] for row in json.loads(result.stdout)["passes"]]
    assert passes[-1] == "round-to-nearest"
    assert "QuantizeLinear" in ops("o.onnx")


def test_compile_stops_after_a_stage():
    result = qcompile(MODEL, *ARM, "--stop-after", "quantized")
    assert result.exit_code == 0, result.output
    assert result.stdout == "The model after stage quantized is digits.arm-int8.quantized.onnx\n"
    assert "QMatMulW8A8" in ops("digits.arm-int8.quantized.onnx")
    result = qcompile(MODEL, *ARM, "--stop-after", "float", "-o", "here.onnx", "--json")
    found = json.loads(result.stdout)
    assert found["bundle"] == "here.onnx"
    assert found["bytes_after"] == Path("here.onnx").stat().st_size
    assert "Gelu" in ops("here.onnx")


def test_compile_with_passes_of_choice():
    text = "..assign-precision, insert-qdq, round-to-nearest, fold-qdq"
    result = qcompile(MODEL, *ARM, "-o", "out", "--pipeline", text, "--quiet")
    assert result.exit_code == 0, result.output
    assert {"QMatMulW8A8", "Gelu"} <= ops("out/model.onnx")


def test_compile_looks_between_the_passes():
    result = qcompile(
        MODEL, *ARM, "-o", "out", "--print-after", "fold-qdq", "--dump-dir", "dumps",
        "--check-numerics", CALIB,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "# after fold-qdq\n" in result.stderr
    assert "QMatMulW8A8(" in result.stderr
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    assert rows["insert-qdq"].split()[-1] == "rounds"
    assert " dB" in rows["insert-qdq"]
    assert "changed nothing" in rows["fuse-batchnorm"]
    dumps = sorted(Path("dumps").glob("*.onnx"))
    assert len(dumps) > 10
    image = np.load(sorted(Path(CALIB).iterdir())[0])["image"]
    for file in (dumps[0], dumps[-1]):
        ort.InferenceSession(file).run(None, {"image": image})


def test_numerics_as_json():
    result = qcompile("pass", FLOATS, MODEL, "o.onnx", "--check-numerics", CALIB, "--json")
    (first, *_) = json.loads(result.stdout)["numerics"]
    assert first["step"] == "canonicalize"
    assert first["outputs"][0]["name"] == "logits"


def test_a_jump_prints_what_came_before_it():
    result = qcompile(
        MODEL, *ARM, "-o", "out", "--check-numerics", CALIB, "--rounding-bound", "90",
    )  # fmt: skip
    assert result.exit_code == 1
    assert "error: insert-qdq changes output 'logits' to" in result.stderr
    assert "less than 90" in result.stderr
    assert "canonicalize" in result.stdout
    assert not Path("out").exists()


def test_a_pass_that_carries_out_plans_brings_them_along():
    text = "fold-qdq,smooth-quant{alpha=0.6}"
    result = qcompile(MODEL, *ARM, "--calib", CALIB, "-o", "out", "--pipeline", text)
    assert result.exit_code == 0
    assert "assign-precision runs before smooth-activations, which needs its plans" in result.output
    assert Path("out").is_dir()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--pipeline", "fold-qdf"], 1, "no pass 'fold-qdf'; did you mean 'fold-qdq'?"),
        (["--pipeline", "fold-qdq{"], 1, "pipeline 'fold-qdq{': a '{' that nothing closes"),
        (["--pipeline", "..{kep=1}"], 1, "options belong to a pass, not to '..'"),
        (["--pipeline", "assign-precision{kep_float=1}"], 1, "has no option 'kep_float'; did you"),
        (["--pipeline", "fold-qdq"], 1, "keep_float is for assign-precision, which the pipeline"),
        (["--pipeline", "insert-qdq,assign-precision"], 1, "insert-qdq needs the plans of assign"),
        (["--print-after", "fold-qdf"], 1, "print after 'fold-qdf': no such pass runs; did you"),
        (["--stop-after", "qdk"], 2, "Invalid value for '--stop-after': 'qdk' is not one of"),
        (["--stop-after", "qdq", "-o", "."], 1, "output . is a folder; name a file in it"),
        (["--stop-after", "qdq", "-o", MODEL], 1, "digits.onnx is the input; name another file"),
        (
            ["--stop-after", "qdq", "-o", "other.txt/o.onnx"],
            1,
            "other.txt/o.onnx cannot be",
        ),
        (["--dump-dir", "."], 1, "the folder . for dumps and the output"),
        (["--check-numerics", "nowhere"], 1, "no samples: nowhere does not exist"),
        (["--check-numerics", "other.txt"], 1, "other.txt is no file of samples"),
        (["--numerics-bound", "50"], 2, "a bound needs --check-numerics SAMPLES"),
        (["--rounding-bound", "50"], 2, "a bound needs --check-numerics SAMPLES"),
        (["--check-numerics", CALIB, "--numerics-bound", "x"], 2, "'x' is not a valid float"),
        (["--check-numerics", CALIB, "--numerics-bound", "inf"], 1, "a number of dB, not inf"),
    ],
)
def test_options_that_are_refused(args, code, message):
    Path("other.txt").touch()
    fails(code, message, MODEL, *ARM, *args)
    assert [file.name for file in Path().iterdir()] == ["other.txt"]


@pytest.mark.parametrize(
    "args",
    [
        ["00-a.onnx", *ARM, "-o", "out", "--dump-dir", "."],
        ["pass", FLOATS, "00-a.onnx", "../o.onnx", "--dump-dir", "."],
    ],
)
def test_dumps_do_not_delete_the_model(args):
    shutil.copy(MODEL, "00-a.onnx")
    fails(1, "the folder . for dumps and the model", *args)
    assert Path("00-a.onnx").read_bytes() == Path(MODEL).read_bytes()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([MODEL, "o.onnx"], 2, "give PASSES IN.onnx OUT.onnx"),
        ([FLOATS, MODEL, "o.onnx", "--pipeline", ".."], 2, "give PASSES IN.onnx OUT.onnx"),
        (["smooth-activations{alpha=0.6}", MODEL, "o.onnx"], 1, "needs the plans of assign-prec"),
        ([f"{FLOATS},fold-qdq{{a=1}}", MODEL, "o.onnx"], 1, "fold-qdq has no option 'a', and no"),
        (["..", MODEL, "o.onnx"], 1, "assign-precision depends on the target: add --target"),
        ([FLOATS, MODEL, "."], 1, "output . is a folder"),
        (["fold-qdq", MODEL, "o.onnx", "--stop-after", "float"], 1, "nothing to do up to stage"),
        ([FLOATS, MODEL, "o.onnx", "--calib", CALIB], 2, "none of these passes reads --calib; ch"),
        (["--list", "fold-qdq"], 2, "--list takes no passes or files: leave out fold-qdq"),
        (["--list", "--target", "x86-int8"], 2, "whatever --target says: leave that out"),
        (["--json", "--calib", "d", "--list"], 2, "whatever --calib says: leave that out"),
        (["--list", "--pipeline", "awq"], 2, "whatever --pipeline says: leave that out"),
        (["--list", "--dump-dir", "d"], 2, "whatever --dump-dir says: leave that out"),
    ],
)
def test_passes_that_are_refused(args, code, message):
    fails(code, message, "pass", *args)


def test_convolutions_are_rounded_between_pairs():
    text = "canonicalize,assign-precision,round-to-nearest"
    message = "round-to-nearest needs insert-qdq before it: the input of"
    fails(1, message, "pass", text, MODEL, "o.onnx", "--target", "x86-int8")
    assert not Path("o.onnx").exists()


def test_a_model_with_ops_of_ours_takes_later_passes_only():
    target = ("--target", "x86-int8")
    for stage in ("quantized", "kernel"):
        result = qcompile(MODEL, *target, "--keep-float", "Conv", "--stop-after", stage,
                          "-o", f"{stage}.onnx", "--no-timing")  # fmt: skip
        assert result.exit_code == 0, result.output
        for passes in ("canonicalize", "fold-qdq", "canonicalize..fold-qdq"):
            fails(1, "the model was compiled before: node", "pass", passes, f"{stage}.onnx",
                  "o.onnx", *target)  # fmt: skip
    fails(1, "the model was compiled before", "pass", "bind-kernels", "kernel.onnx", "o.onnx",
          *target)  # fmt: skip
    result = qcompile("pass", "fuse-regions..bind-kernels", "quantized.onnx", "o.onnx", *target)
    assert result.exit_code == 0, result.output
    assert any(op.startswith("QMatMulW8A8_") for op in ops("o.onnx"))


def test_the_documented_passes_are_those_of_the_code():
    written = (Path(__file__).parents[1] / "docs" / "passes.md").read_text(encoding="utf-8")
    assert written == document(), "run: python -m qcompiler.pass_docs > docs/passes.md"
