"""qcompile bench: as a table, as JSON, on samples and images, and with bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
from terminal import CALIB, MODEL, fails, qcompile

pytestmark = pytest.mark.usefixtures("empty_folder")


def test_bench(arm_digits):
    result = qcompile("bench", arm_digits, "--against", MODEL, "--seconds", 0.05, "--threads", 1)
    assert result.exit_code == 0, result.output
    flat = " ".join(result.stdout.split())
    assert "image float32 1x1x20x20, random, batch taken as 1" in flat
    assert "Spinning on during a run, stopped after it" in flat
    assert "Speedup" in flat
    assert max(map(len, result.stdout.splitlines()[4:])) <= 100
    assert "1 thread" in result.stderr


def test_bench_as_json(arm_digits):
    result = qcompile("bench", arm_digits, "--against", MODEL, "--seconds", 0.05, "--threads", 1,
                      "--threads", 2, "--shapes", "image=3x1x20x20", "--json")  # fmt: skip
    found = json.loads(result.stdout)
    assert [measured["threads"] for measured in found["results"]] == [1, 2]
    assert found["inputs"][0]["shape"] == [3, 1, 20, 20]
    assert found["inputs"][0]["assumed"] == {}
    assert result.stderr == ""


def test_bench_quietly(arm_digits):
    result = qcompile(
        "bench", arm_digits, "--against", MODEL, "--seconds", 0.05, "--threads", 1, "-q"
    )
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "Speedup" in result.stdout


def test_bench_with_samples(arm_digits):
    result = qcompile("bench", arm_digits, "--against", MODEL, "--seconds", 0.01, "--threads", 1,
                      "--data", CALIB)  # fmt: skip
    assert "16x1x20x20, first of 4 samples" in result.stdout


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "Missing option '--against'"),
        (["--against", "nope.onnx"], 1, "no model: nope.onnx does not exist"),
        (["--against", MODEL, "--threads", "x"], 2, "'x' is not a valid integer."),
        (["--against", MODEL, "--threads", "0"], 2, "0 is not in the range x>=1"),
        (["--against", MODEL, "--seconds", "0"], 2, "not in the range x>0"),
        (["--against", MODEL, "--seconds", "-1"], 2, "not in the range x>0"),
        (["--against", MODEL, "--seconds", "nan"], 2, "nan is no number of seconds"),
        (["--against", MODEL, "--seconds", "inf"], 2, "inf is no number of seconds"),
        (["--against", MODEL, "--seconds", "soon"], 2, "'soon' is not a valid"),
        (["--against", MODEL, "--shapes", "image"], 2, "'image' is not NAME=SIZExSIZE"),
        (["--against", MODEL, "--shapes", "image=1xa"], 2, "'image=1xa' is not NAME=SIZExSIZE"),
        (["--against", MODEL, "--shapes", "image=1x0"], 2, "'image=1x0' is not NAME=SIZExSIZE"),
        (["--against", MODEL, "--shapes", "imag=1x1"], 1, "did you mean 'image'?"),
        (["--against", MODEL, "--shapes", "image=1x1"], 1, "image=1x1 does not fit"),
        (["--against", MODEL, "--data", "nowhere"], 1, "nowhere does not exist"),
        (["--against", MODEL, "--preprocess", "size=20"], 2, "is about samples: add --data"),
        (["--against", MODEL, "--data", CALIB, "--shapes", "image=1x1x20x20"], 1, "not both"),
    ],
)
def test_bench_with_bad_input(arm_digits, args, code, message):
    fails(code, message, "bench", arm_digits, *args)


def test_bench_and_others_on_images(arm_digits):
    image = pytest.importorskip("PIL.Image")
    Path("images").mkdir()
    image.fromarray(np.zeros((20, 20), np.uint8)).save("images/a.png")
    images = ("images", "--preprocess", "size=20,order=gray")
    timed = ("bench", arm_digits, "--against", MODEL, "--seconds", "0.01", "--threads", "1")
    assert "first of 1 samples" in qcompile(*timed, "--data", *images).stdout
    passes = ("pass", "..insert-qdq", MODEL, "o.onnx", "--target", "arm-int8")
    result = qcompile(*passes, "--calib", *images)
    assert result.exit_code == 0, result.output
    message = "--check-numerics takes arrays, and images has images: give .npz or .npy files"
    fails(2, message, "pass", "canonicalize", MODEL, "o.onnx", "--check-numerics", "images")
