"""The x86 kernels by themselves: integers exactly, floats closely, and never a byte too far."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from instruction_sets import each_raw_isa
from raw_kernels import (
    FEW,
    SIZES,
    Array,
    Guarded,
    accumulate,
    int8,
    load,
    operands,
    pointer,
    quantize,
)
from scipy import special

from qcompiler.ir.region import Region, Step
from qcompiler.targets import x86
from qcompiler.targets.x86 import AVX2, AVX512_VNNI, Isa
from qcompiler.targets.x86.tile import tile_shape


def product(k: int, n: int, extras: tuple[str, ...] = (), *steps: Step) -> Region:
    return Region("QMatMulW8A8", (("K", k), ("N", n)), extras, steps)  # type: ignore[arg-type]


def run_product(isa: Isa, region: Region, q: Array, s: Array, w: Array, ws: Array, *extras: Array,
                folder: Path, panels: tuple[int, int] | None = None) -> Array:  # fmt: skip
    """The kernel's result, with every operand but the packed weights ending at a guard page."""
    from qcompiler.targets.x86.qmatmul import qmatmul_function

    kernel = load({"f": qmatmul_function(region, isa)}, folder, isa).f
    guarded = Guarded()
    rows, (weights, *rest), _ = operands(q, w, isa)
    padded = np.zeros(weights.shape[0] * tile_shape(w.shape[1], isa).columns, np.float32)
    padded[: ws.size] = ws
    y = guarded(np.full((q.shape[0], w.shape[1]), np.nan, np.float32))
    arrays = [*map(guarded, (rows, s, weights, *rest, padded, *extras)), y]
    kernel(*map(pointer, arrays), q.shape[0], *(panels or (0, weights.shape[0])))
    return y.copy()


@each_raw_isa("QMatMulW8A8")
@FEW
@given(k=SIZES, n=SIZES, seed=st.integers(0, 2**32 - 1))
@example(k=1, n=1, seed=0)
@example(k=3, n=17, seed=0)
@example(k=384, n=192, seed=0)
@example(k=1027, n=33, seed=0)
def test_sums_are_exact(isa: Isa, k: int, n: int, seed: int, tmp_path: Path) -> None:
    from qcompiler.targets.x86.qmatmul import accumulator_function

    rng, guarded, shape = np.random.default_rng(seed), Guarded(), tile_shape(n, isa)
    kernel = load({"f": accumulator_function(k, n, isa)}, tmp_path, isa).f
    w = int8(rng, k, n)
    for m in range(1, 2 * shape.rows + 2):
        q = rng.integers(0, 256, (m, k)).astype(np.uint8)
        y = guarded(np.full((m, n), -1, np.int32))
        rows, (weights, *rest), _ = operands(q, w, isa)
        arrays = [*map(guarded, (rows, weights, *rest)), y]
        kernel(*map(pointer, arrays), m, 0, weights.shape[0])
        np.testing.assert_array_equal(y, accumulate(q, w))


@pytest.mark.parametrize(("k", "n"), [(1, 1), (3, 17), (64, 48), (130, 64), (27, 193)])
def test_loops_of_avx512_on_any_processor(
    k: int, n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plain_unit import PlainUnit

    from qcompiler.targets.x86 import qmatmul

    monkeypatch.setattr(qmatmul, "unit_of", lambda isa: PlainUnit())
    kernel = load({"f": qmatmul.accumulator_function(k, n, AVX512_VNNI)}, tmp_path, AVX2).f
    rng, guarded, shape = np.random.default_rng(n), Guarded(), tile_shape(n, AVX512_VNNI)
    w = int8(rng, k, n)
    for m in range(1, 2 * shape.rows + 2):
        q = rng.integers(0, 256, (m, k)).astype(np.uint8)
        y = guarded(np.full((m, n), -1, np.int32))
        rows, (weights, *rest), _ = operands(q, w, AVX512_VNNI)
        arrays = [*map(guarded, (rows, weights, *rest)), y]
        kernel(*map(pointer, arrays), m, 0, weights.shape[0])
        np.testing.assert_array_equal(y, accumulate(q, w))


@each_raw_isa("QMatMulW8A8")
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 513, 131071])
def test_sums_of_extreme_values_are_exact(isa: Isa, k: int, tmp_path: Path) -> None:
    """255 * -128 over the longest K is the most a lane has to hold; saturating twins fail here."""
    from qcompiler.targets.x86.qmatmul import accumulator_function

    n, guarded = 48, Guarded()
    kernel = load({"f": accumulator_function(k, n, isa)}, tmp_path, isa).f
    for activation, weight in ((255, -128), (255, 127), (0, -128)):
        q, w = np.full((3, k), activation, np.uint8), np.full((k, n), weight, np.int8)
        y = guarded(np.zeros((3, n), np.int32))
        rows, (weights, *rest), _ = operands(q, w, isa)
        arrays = [*map(guarded, (rows, weights, *rest)), y]
        kernel(*map(pointer, arrays), 3, 0, weights.shape[0])
        np.testing.assert_array_equal(y, (activation - 128) * weight * k)


@each_raw_isa("QMatMulW8A8")
@FEW
@given(begin=st.integers(0, 4), count=st.integers(1, 5), m=st.integers(1, 20))
@example(begin=0, count=5, m=1)
@example(begin=1, count=3, m=1)
def test_a_range_of_panels_writes_only_its_columns(
    isa: Isa, begin: int, count: int, m: int, tmp_path: Path
) -> None:
    k, n = 20, 48 * 4 + 20
    rng = np.random.default_rng(0)
    q, w = rng.integers(0, 256, (m, k)).astype(np.uint8), int8(rng, k, n)
    s, ws = np.ones((m, 1), np.float32), np.ones(n, np.float32)
    columns = tile_shape(n, isa).columns
    panels = -(-n // columns)
    begin = min(begin, panels - 1)
    end = min(begin + count, panels)
    y = run_product(isa, product(k, n), q, s, w, ws, folder=tmp_path, panels=(begin, end))
    inside = slice(begin * columns, min(end * columns, n))
    np.testing.assert_array_equal(y[:, inside], accumulate(q, w)[:, inside].astype(np.float32))
    outside = np.delete(y, inside, axis=1)
    assert np.isnan(outside).all()


@each_raw_isa("Quantize")
@pytest.mark.parametrize("is_fast", [False, True])
@FEW
@given(k=st.integers(1, 300), m=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
@example(k=1, m=1, seed=0)
@example(k=64, m=2, seed=1)
def test_quantize_is_bit_identical(
    isa: Isa, is_fast: bool, k: int, m: int, seed: int, tmp_path: Path
) -> None:
    """The fast one too, but for one number in 1e11."""
    from qcompiler.targets.x86.quantize import quantize_function

    rng, guarded = np.random.default_rng(seed), Guarded()
    kernel = load({"f": quantize_function(k, isa, is_fast=is_fast)}, tmp_path, isa).f
    normal = rng.standard_normal((m, k)).astype(np.float32)
    # With amax 127 or 254 the scale is exact, and halves are exact ties.
    ties = rng.integers(-254, 255, (m, k)).astype(np.float32) / 2
    ties[:, 0] = 127
    zeros, tiny = np.zeros_like(normal), normal * np.float32(1e-35)
    for values in (normal, normal * np.float32(1e30), ties, ties * 2, zeros, tiny):
        x = guarded(values)
        q, s = guarded(np.zeros((m, k), np.uint8)), guarded(np.zeros((m, 1), np.float32))
        kernel(*map(pointer, (x, q, s)), m, k)
        expected_q, expected_s = quantize(values)
        np.testing.assert_array_equal(q, expected_q)
        np.testing.assert_array_equal(s.view(np.int32), expected_s.view(np.int32))


ELEMENTWISE: list[tuple[str, dict[str, float | str], Callable[[Array], Array]]] = [
    ("Relu", {}, lambda x: np.maximum(x, 0)),
    ("Clip", {"min": -1.5, "max": 2.0}, lambda x: np.clip(x, -1.5, 2)),
    ("Clip", {"max": 0.5}, lambda x: np.minimum(x, 0.5)),
    ("Gelu", {}, lambda x: x * special.ndtr(x)),
    ("Gelu", {"approximate": "tanh"},
     lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
    ("Sigmoid", {}, special.expit),
    ("Tanh", {}, np.tanh),
]  # fmt: skip


@each_raw_isa("QMatMulW8A8")
@pytest.mark.parametrize(("op", "attributes", "reference"), ELEMENTWISE)
def test_elementwise(
    isa: Isa,
    op: str,
    attributes: dict[str, float | str],
    reference: Callable[[Array], Array],
    tmp_path: Path,
) -> None:
    """Absolute error at most 1e-6, or 3e-5 of Gelu's tables, over a grid that includes where exp
    under- and overflows."""
    region = product(1, 40, (), Step(op, (0,), tuple(attributes.items())))
    grid = np.arange(-128, 128)
    q, w = (grid + 128).astype(np.uint8)[:, None], np.ones((1, 40), np.int8)
    s = np.full((256, 1), 1 / 128, np.float32)
    # From a fine grid within [-0.004, 0.004] to a coarse one over [-120, 120].
    ws = np.geomspace(0.004, 120, 40).astype(np.float32)
    y = run_product(isa, region, q, s, w, ws, folder=tmp_path)
    x = grid[:, None] * (s * ws).astype(np.float64)
    tolerance = (3e-5 if op == "Gelu" else 1e-6) + 2e-7 * np.abs(x)
    assert (np.abs(y - reference(x)) <= tolerance).all()


@each_raw_isa("QMatMulW8A8")
@pytest.mark.parametrize("n", [1, 15, 48, 64, 100])
def test_steps_read_extras_and_earlier_values(isa: Isa, n: int, tmp_path: Path) -> None:
    """((a + bias) * a - residual) + bias, with operands used twice and out of order."""
    steps = (Step("Add", (0, -2)), Step("Mul", (1, 0)), Step("Sub", (2, -1)), Step("Add", (3, -2)))
    region = product(9, n, ("tensor", "channel"), *steps)
    rng, m = np.random.default_rng(n), 11
    q, w = rng.integers(0, 256, (m, 9)).astype(np.uint8), int8(rng, 9, n)
    s, ws = rng.random((m, 1), np.float32) / 100, rng.random(n, np.float32)
    residual = rng.standard_normal((m, n)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    y = run_product(isa, region, q, s, w, ws, residual, bias, folder=tmp_path)
    a = accumulate(q, w) * (s.astype(np.float64) * ws)
    np.testing.assert_allclose(y, (a + bias) * a - residual + bias, rtol=2e-5, atol=2e-4)


@each_raw_isa("QMatMulW8A8")
def test_division_by_zero_rows_do_not_spread(isa: Isa, tmp_path: Path) -> None:
    """A NaN scale stays in its row."""
    q, w = np.full((9, 8), 200, np.uint8), np.ones((8, 48), np.int8)
    s = np.ones((9, 1), np.float32)
    s[4] = np.nan
    y = run_product(isa, product(8, 48), q, s, w, np.ones(48, np.float32), folder=tmp_path)
    assert np.isnan(y[4]).all()
    assert np.isfinite(np.delete(y, 4, axis=0)).all()


@each_raw_isa("QMatMulU8S8")
@pytest.mark.parametrize("anchor", ["QMatMulU8S8", "QMatMulU8U8"])
@pytest.mark.parametrize("zero", [0, 128, 201, 255])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (7, 33, 50), (17, 6, 17)])
def test_one_scale_and_zero_points(
    isa: Isa, anchor: str, zero: int, m: int, k: int, n: int, tmp_path: Path
) -> None:
    """The sums of (q - z) (w - wz), exactly, from weights less 128 and what the glue computes."""
    from qcompiler.targets.x86.qmatmul import qmatmul_function

    rng, guarded = np.random.default_rng(n), Guarded()
    q, w = rng.integers(0, 256, (m, k)).astype(np.uint8), int8(rng, k, n)
    wz = rng.integers(-128, 128, n) if anchor == "QMatMulU8U8" else np.zeros(n, np.int64)
    activations, (weights, *rest), after = operands(q, w, isa, anchor, zero)
    columns = weights.shape[0] * tile_shape(n, isa).columns
    ones, zeros = np.zeros(columns, np.float32), np.zeros(columns, np.int32)
    ones[:n], zeros[:n] = 1, wz
    rows = q.astype(np.int32).sum(1, dtype=np.int32) - k * zero
    arrays = [activations, np.ones(1, np.float32), weights, *rest, ones, *after]
    arrays += [rows, zeros] if anchor == "QMatMulU8U8" else []
    y = guarded(np.full((m, n), np.nan, np.float32))
    region = Region(anchor, (("K", k), ("N", n)))
    kernel = load({"f": qmatmul_function(region, isa)}, tmp_path, isa).f
    kernel(*map(pointer, [*map(guarded, arrays), y]), m, 0, weights.shape[0])
    np.testing.assert_array_equal(y, (q.astype(np.int64) - zero) @ (w - wz))


def windows(k: int, taps: int, step: int, *pads: int) -> Region:
    sizes = (("K", k), ("N", 4), ("R", taps), ("S", step))
    return Region("WindowedQMatMulW8A8", sizes, attributes=(("pads", pads),) if pads else ())


def requantized(
    k: int, n: int, outputs: tuple[str, ...] = ("yq", "ys"), widths: tuple[int, ...] = ()
) -> Region:
    sizes = (("K", k), ("N", n))
    return Region("RequantizedQMatMulW8A8", sizes, outputs=outputs, widths=widths)


@pytest.mark.parametrize(
    ("region", "reason"),
    [
        (Region("QMatMulU8S8", (("K", 65794), ("N", 1))), "more than 65792 products may overflow"),
        (Region("QMatMulU8U8", (("K", 33026), ("N", 1))), "more than 33024 products may overflow"),
        (Region("QConv", (("K", 4),)), "no kernel for QConv"),
        (Region("QMatMulW8A8", (("K", 4),)), "takes the sizes K, N"),
        (product(0, 4), "not positive"),
        (product(1 << 16, 1 << 15), "65536 x 32768 weights take more than 2^30 bytes"),
        (product(1 << 17, 1), "an int32 sum of more than 131071 products may overflow"),
        (Region("Quantize", (("K", 1 << 31),)), "more than 2^30"),
        (Region("Quantize", (("K", 4),), (), (Step("Relu", (0,)),)), "takes no epilogue"),
        (product(4, 4, ("channel",) * 9), "at most 8"),
        (product(4, 4, (), Step("Erf", (0,))), "no vector form of Erf"),
        (product(4, 4, (), Step("Add", (0,))), "takes 2 operands, not 1"),
        (product(4, 4, (), Step("Add", (0, -1))), "values that do not exist"),
        (product(4, 4, (), Step("Relu", (1,))), "values that do not exist"),
        (product(4, 4, ("channel",) * 2, Step("DequantizeLinear", (0, -1, -2))), "reads floats"),
        (
            product(
                4, 4, ("channel",) * 2, Step("QuantizeLinear", (0, -1, -2)), Step("Relu", (1,))
            ),
            "Relu reads integers",
        ),
        (product(4, 4, ("tensor",) * 2, Step("QuantizeLinear", (0, -1, -2))), "one per channel"),
        (product(4, 4, (), Step("Relu", (0,), (("alpha", 1.0),))), "no attribute alpha"),
        (windows(64, 3, 1), "rows of 64 are no windows of 3 rows"),
        (windows(64, 1, 1 << 15), "windows 2097152 floats apart; at most 1048576"),
        (windows(64, 2, 1, 1, -1), "(1, -1) rows of zeros around x: 0 to 2^30 are supported"),
        (windows(8192, 2, 1), "rows of more than 4096 are quantized first"),
        (requantized(64, 4097), "rows of more than 4096 are quantized later"),
        (requantized(64, 96, widths=(48, 48)), "one result of floats is quantized"),
        (requantized(64, 96, outputs=("y",)), "one result of floats is quantized"),
        (product(4, 4, (), Step("Gelu", (0,), (("approximate", "x"),))), "known are none, tanh"),
    ],
)
def test_unsupported_regions_say_why(region: Region, reason: str) -> None:
    said = x86.supports(region)
    assert said is not None
    assert reason in said


def test_supported_regions() -> None:
    assert x86.supports(Region("Quantize", (("K", 1),))) is None
    assert x86.supports(product(7, 3, ("channel",), Step("Add", (0, -1)))) is None
