"""Convolutions of one dimension, and what follows them: which products they become, end to end."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from golden import model_of, sqnr

import qcompiler
from qcompiler.pipeline import Pipeline
from qcompiler.report import Report

RNG = np.random.default_rng(3)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution and an activation."""

    width: int
    then: str = "Gelu"
    taps: int = 3
    stride: int = 1
    pad: int = 1
    dilation: int = 1


def weight(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, np.float32) / np.float32(np.sqrt(np.prod(shape[1:])))


def stack(channels: int, layers: list[Layer], width: int) -> ir.Model:
    """Layers over tokens [batch, channels, tokens], and a product of that width behind them."""
    weights, lines, value = {}, [], "x"
    for i, layer in enumerate(layers):
        weights[f"w{i}"] = weight(layer.width, channels, layer.taps)
        weights[f"b{i}"] = weight(layer.width)
        lines.append(
            f"c{i} = Conv <pads = [{layer.pad}, {layer.pad}], strides = [{layer.stride}],"
            f" dilations = [{layer.dilation}]>"
            f" ({value}, w{i}, b{i}) a{i} = {layer.then} (c{i})"
        )
        channels, value = layer.width, f"a{i}"
    weights["last"] = weight(channels, width)
    lines.append(f"t = Transpose <perm = [0, 2, 1]> ({value}) y = MatMul (t, last)")
    head = f"g (float[n,{weights['w0'].shape[1]},t] x) => (float[n,u,v] y)"
    return model_of(f"{head} {{ {' '.join(lines)} }}", weights)


def compiled(model: ir.Model, folder: Path) -> tuple[Report, list[str]]:
    """The report, and the products in order, without what all their names have in common."""
    pipeline = Pipeline.default("x86-int8")
    report = qcompiler.compile(model, "x86-int8", folder / "bundle", pipeline=pipeline)
    ops = [d.op.replace("QMatMulW8A8", "") for d in report.decisions if "QMatMul" in d.op]
    return report, [re.sub("_[0-9a-f]{6}$", "_#", op) for op in ops]


def assert_agrees(report: Report, channels: int, tokens: int = 301) -> None:
    """Kernels and bodies compute the same."""
    x = {"x": RNG.standard_normal((2, channels, tokens), np.float32)}
    (body,) = qcompiler.load(report.bundle, native=False).run(None, x)
    (native,) = qcompiler.load(report.bundle).run(None, x)
    assert native.shape == body.shape
    assert sqnr(body, native) > 50


STACKS: dict[str, tuple[list[Layer], list[str]]] = {
    "padded": (
        [Layer(24), Layer(24, "Relu", stride=2)],
        ["Windowed_K24_N24_R3_S1_AddC_Gelu_#", "Windowed_K72_N24_R3_S2_AddC_Relu_#",
         "Dynamic_K24_N16"],
    ),
    "not padded": (
        [Layer(24, "Relu", pad=0), Layer(40, pad=0, stride=2), Layer(24, "Relu", pad=0)],
        ["Windowed_K24_N24_R3_S1_AddC_Relu", "Windowed_K72_N40_R3_S2_AddC_Gelu",
         "Windowed_K120_N24_R3_S1_AddC_Relu", "Dynamic_K24_N16"],
    ),
    "dilated": (
        [Layer(24, "Relu", pad=d, dilation=d) for d in (1, 2, 4, 8)],
        ["Windowed_K24_N24_R3_S1_AddC_Relu_#", *["Windowed_K72_N24_R3_S1_AddC_Relu_#"] * 3,
         "Dynamic_K24_N16"],
    ),
    "one tap last": (
        [Layer(24), Layer(48, taps=1, pad=0)],
        ["Windowed_K24_N24_R3_S1_AddC_Gelu_#", "Requantized_K24_N48_AddC_Gelu_yqys",
         "_K48_N16"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STACKS)
def test_convolutions_read_windows(tmp_path, name):
    layers, products = STACKS[name]
    report, ops = compiled(stack(8, layers, 16), tmp_path)
    assert ops == products
    assert_agrees(report, 8)


def test_speech_encoders_read_windows_throughout(tmp_path):
    """The two convolutions that Whisper begins with, and its first product."""
    report, ops = compiled(stack(80, [Layer(384), Layer(384, stride=2)], 384), tmp_path)
    assert ops == [
        "Windowed_K240_N384_R3_S1_AddC_Gelu_#", "Windowed_K1152_N384_R3_S2_AddC_Gelu_#",
        "Dynamic_K384_N384",
    ]  # fmt: skip
    assert {d.op for d in report.decisions if "QMatMul" not in d.op} == {"Transpose"}
    first, second, _ = (d.why for d in report.decisions if "QMatMul" in d.op)
    assert "quantizes windows of its input, with zeros around it" in first
    assert "and so not its result" in second and "and so not its result" not in first
    assert_agrees(report, 80)


def test_narrow_windows_are_copied_and_wide_results_quantized(tmp_path):
    report, ops = compiled(stack(8, [Layer(64)], 16), tmp_path)
    assert ops == ["Requantized_K24_N64_AddC_Gelu_yqys", "_K64_N16"]
    (why,) = (d.why for d in report.decisions if "Requantized" in d.op)
    assert "copies of its windows cost less than a result of floats" in why
    assert_agrees(report, 8)


def test_windows_too_wide_for_a_kernel_are_copied(tmp_path):
    """As the feed-forward layers of speech synthesis have them: weights that no cache holds."""
    report, ops = compiled(stack(256, [Layer(1024, "Relu", taps=9, pad=4)], 16), tmp_path)
    assert ops == ["Requantized_K2304_N1024_AddC_Relu_yqys", "_K1024_N16"]
    assert_agrees(report, 256, tokens=41)


@pytest.mark.parametrize("then", ["Gelu", "Relu"])
def test_mlps_quantize_what_is_between_their_products(tmp_path, then):
    weights = {"w": weight(64, 128), "b": weight(128), "v": weight(128, 64)}
    text = (
        "g (float[n,t,64] x) => (float[n,t,64] y) "
        f"{{ h = MatMul (x, w) i = Add (h, b) j = {then} (i) y = MatMul (j, v) }}"
    )
    _, ops = compiled(model_of(text, weights), tmp_path)
    assert ops == [f"Requantized_K64_N128_AddC_{then}_yqys", "_K128_N64"]
