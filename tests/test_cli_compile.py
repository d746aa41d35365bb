"""`qcompile MODEL`: what it prints, its options, bad input."""

import json
import os
from pathlib import Path

import pytest
from terminal import ARM, CALIB, MODEL, TEST, fails, qcompile

from qcompiler.ir.decisions import NO_WEIGHTS, decision_of

pytestmark = pytest.mark.usefixtures("empty_folder")


def test_compile_tells_what_was_done():
    result = qcompile(MODEL, *ARM)
    assert result.exit_code == 0, result.output
    flat = " ".join(result.stdout.split())
    assert "13 function body QMatMulW8A8 no arm-int8 kernels yet" in flat
    assert "1 float Conv kept float by request (Conv)" in flat
    assert "no weights to quantize: Add 18, Reshape 9" in flat
    assert "Size 423.9 kB → " in flat
    assert "times smaller" in flat
    assert "Memory" in flat
    assert "Bundle digits.arm-int8/" in flat
    assert f"Next qcompile bench digits.arm-int8 --against {MODEL}" in flat
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 100
    assert "warning: arm-int8 has no kernels of its own" in result.stderr
    assert Path("digits.arm-int8/model.onnx").is_file()


def test_compile_prints_a_line_per_stage():
    stages = [line.split()[-1] for line in qcompile(MODEL, *ARM, "-o", "b").stderr.splitlines()]
    assert stages[:2] == ["load", "canonicalize"]
    assert "write" in stages
    assert len(set(stages)) == len(stages)


def test_compile_with_calibration():
    result = qcompile(MODEL, "--target", "arm-int8", "--calib", CALIB, "-o", "b")
    assert result.exit_code == 0
    assert f"qcompile compare {MODEL} b --data DIR\n" in result.stdout
    assert "ORT's own QLinearConv" in result.stdout
    assert sum("insert-qdq" in line for line in result.stderr.splitlines()) == 1


def test_compile_verbose_lists_decisions_and_phases():
    stdout = qcompile(MODEL, *ARM, "-v").stdout
    assert "node_softmax" in stdout
    assert "round-to-nearest" in stdout


def test_compile_shows_its_choices_and_makes_them_again():
    x86 = (MODEL, "--target", "x86-int8", "--keep-float", "Conv")
    stdout = qcompile(*x86, "--no-timing", "-v", "-o", "b").stdout
    row = next(line.split() for line in stdout.splitlines() if line.startswith("MatMul 64x256"))
    assert row[2:4] == ["our", "kernel"]
    assert row[-1] == "model"
    assert row.count("µs") == 3
    again = qcompile(*x86, "--choices", "b", "-o", "c")
    assert again.exit_code == 0, again.output
    assert Path("c/manifest.json").read_bytes() == Path("b/manifest.json").read_bytes()


def test_compile_quietly():
    result = qcompile(MODEL, *ARM, "-q")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.startswith("warning: arm-int8 has no kernels")
    assert result.stderr.count("\n") == 1


def test_compile_as_json():
    result = qcompile(MODEL, *ARM, "--json", "-o", "b")
    report = json.loads(result.stdout)
    assert (report["bundle"], report["target"], result.stderr) == ("b", "arm-int8", "")
    assert {"bytes_before", "seconds", "groups", "decisions", "warnings"} <= set(report)


def test_compile_merges_recipe_and_options():
    Path("r.toml").write_text('keep_float = ["Conv"]\ngroup_size = 32\nfloat = "fp16"\n')
    result = qcompile(MODEL, "--target", "cuda-int4", "--recipe", "r.toml", "--keep-float",
                      "node_linear*", "--group-size", 64, "--float", "fp32", "-o", "b",
                      "-q")  # fmt: skip
    assert result.exit_code == 0, result.output
    recipe = json.loads(Path("b/manifest.json").read_text())["recipe"]
    assert (recipe["keep_float"], recipe["group_size"]) == (["Conv", "node_linear*"], 64)
    assert recipe["float"] == "fp32"


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["nope.onnx", "--target", "x86-int8"], 1, "no model: nope.onnx does not exist"),
        ([MODEL, "--target", "x86-int9"], 1, "unknown target 'x86-int9'; did you mean 'x86-int8'"),
        ([MODEL, "--target", "arm-int8"], 1, "give samples with --calib DIR"),
        ([MODEL, *ARM, "--float", "half"], 1, "float must be fp16 or fp32, not 'half'; did you"),
        ([MODEL, *ARM, "--float", ""], 1, "float must be fp16 or fp32, not ''"),
        ([MODEL, *ARM, "--shapes", "x=0"], 2, "'x=0' is not NAME=SIZExSIZE"),
        ([MODEL, *ARM, "--shapes", "x=1x2"], 1, "no input 'x'; the inputs are image"),
        ([MODEL, *ARM, "--shapes", "image=1x2"], 1, "image=1x2 does not fit, the model takes"),
        ([MODEL, *ARM, "--choices", "no"], 1, "no choices: no does not exist; give a bundle"),
        ([MODEL, "--target", "X86-INT8"], 1, "unknown target 'X86-INT8'; did you mean 'x86-int8'"),
        ([MODEL, *ARM, "--calib-method", "mss"], 1, "calibration method 'mss'; did you mean 'mse'"),
        ([MODEL, *ARM, "-o", f"{MODEL}/out"], 1, "digits.onnx: Not a directory; name another"),
        ([MODEL, *ARM, "--dump-dir", f"{MODEL}/d"], 1, "for dumps cannot be written: "),
        ([MODEL, *ARM, "--choices", "no", "--shapes", "image=1"], 1, "choices, not both"),
        ([MODEL, "--target", "arm-int8", "--calib", "no"], 1, "no samples: no does not exist"),
        ([MODEL, "--target", "arm-int8", "--calib-method", "mse"], 2, "add --calib"),
        ([MODEL, "--target", "arm-int8", "--preprocess", "size=8"], 2, "add --calib"),
        (
            [MODEL, "--target", "arm-int8", "--calib", CALIB, "--calib-method", "max"],
            1,
            "unknown calibration method 'max'",
        ),
        (
            [MODEL, "--target", "arm-int8", "--calib", CALIB, "--preprocess", "size=8"],
            1,
            "holds no images: leave out --preprocess",
        ),
        ([MODEL, "--target", "arm-int8", "--calib", "."], 1, "no samples: . holds no .npz file"),
        ([MODEL, *ARM, "--recipe", "no.toml"], 1, "no recipe: no.toml does not exist"),
        ([MODEL, *ARM, "--keep-float", "Sofmax"], 1, "did you mean 'Softmax'?"),
        ([MODEL, *ARM, "--keep-float", "re:("], 1, "keep_float 're:(' is no regular expression"),
        ([MODEL, *ARM, "--group-size", "33"], 1, "must be 16, 32, 64, 128 or 256"),
        ([MODEL, *ARM, "--group-size", "many"], 2, "'many' is not a valid integer"),
        ([MODEL, *ARM, "--keep-float", "Gemm"], 1, "a Gemm is a MatMul of the same name and"),
        ([MODEL, *ARM, "-o", ""], 2, "'--output': it is empty"),
        (["", "--target", "arm-int8"], 2, "'MODEL': it is empty"),
        ([MODEL, *ARM, "--calib", CALIB, "--calib-method", ""], 1, "calibration method ''"),
        ([MODEL, *ARM, "--calib-method", ""], 1, "calibration method ''"),
        ([MODEL, *ARM, "--calib", "bad.py:f"], 1, "a module has no .py: bad:f"),
        ([MODEL, *ARM, "--strict"], 1, "--strict: 22 nodes fall back"),
        ([MODEL, *ARM, "-o", __file__], 1, "is a file; name a folder with -o DIR"),
        ([MODEL, *ARM, "-o", TEST], 1, "holds other files (batch_00.npz"),
    ],
)
def test_compile_with_bad_input(args, code, message):
    fails(code, message, *args)
    assert not os.listdir()


def test_ops_without_weights_are_told_apart():
    import onnx_ir as ir

    assert decision_of(ir.node("Relu", [ir.val("x")])).why == NO_WEIGHTS
