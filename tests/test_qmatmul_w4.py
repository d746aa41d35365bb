"""Products of int8 activations by int4 weights: kernels against exact sums and their bodies."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from golden import sqnr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from instruction_sets import compiled_for_here, each_isa, offer
from numpy.typing import NDArray
from plain_unit import PlainUnit
from raw_kernels import Guarded, load, pointer

from qcompiler.ir import dialect
from qcompiler.ir.region import Region, Step
from qcompiler.session_options import new_session_options
from qcompiler.targets import x86
from qcompiler.targets.library import KernelCache, build_library
from qcompiler.targets.x86 import AVX2, AVX512_VNNI, Isa, qmatmul_w4
from qcompiler.targets.x86.w4_family import chunks_of, w4_tile

DOMAIN = "qcompiler.00b4d1e5"
BIAS = Step("Add", (0, -1))
Array = NDArray[Any]


def product(k: int, n: int, group: int, extras: tuple[Any, ...] = (), *steps: Step) -> Region:
    return Region("QMatMulW4A8", (("K", k), ("N", n), ("G", group)), extras, steps)


def of_two_levels(region: Region) -> Region:
    return dataclasses.replace(region, anchor="QMatMulW4S8A8")


def requantized(
    region: Region, outputs: tuple[str, ...] = ("yq", "ys"), flags: tuple[str, ...] = ()
) -> Region:
    """A region that quantizes its result, times a factor of each channel with "smoothed"."""
    return dataclasses.replace(
        region, anchor=f"Requantized{region.anchor}", outputs=outputs, flags=flags,
        extras=(*region.extras, *["channel"] * len(flags)),
    )  # fmt: skip


REGIONS = (
    product(1, 1, 32),
    product(3, 5, 8),
    product(32, 16, 32, ("channel",), BIAS),
    product(40, 7, 32),
    product(63, 47, 16, ("channel", "tensor"), BIAS, Step("Add", (1, -2))),
    product(384, 193, 32, ("channel",), BIAS, Step("Gelu", (1,))),
    product(100, 66, 24, ("tensor",), Step("Add", (0, -1)), Step("Relu", (1,))),
    product(130, 64, 130),
    product(256, 33, 128, ("channel",), BIAS, Step("Sigmoid", (1,)), Step("Mul", (1, 2))),
    product(520, 130, 64),
    of_two_levels(product(70, 33, 32)),
    of_two_levels(product(384, 50, 64, ("channel",), BIAS, Step("Relu", (1,)))),
    dataclasses.replace(product(96, 128, 32, ("channel",), BIAS), widths=(64, 32, 32)),
    of_two_levels(dataclasses.replace(product(64, 96, 16), widths=(32, 64))),
    product(300, 33, 32),
)
ALL = ("y", "yq", "ys")
WIDE = product(800, 1700, 32)
"""With weights that an L2 does not hold beside other things."""
REQUANTIZED = (
    *map(requantized, (REGIONS[0], REGIONS[1], REGIONS[4], REGIONS[5], REGIONS[7], REGIONS[8])),
    requantized(REGIONS[5], ALL, ("smoothed",)),
    requantized(REGIONS[6], ALL),
    requantized(REGIONS[2], flags=("smoothed",)),
    requantized(product(16, 4096, 8)),
    requantized(WIDE),
    requantized(WIDE, ALL),
    requantized(REGIONS[10]),
    requantized(REGIONS[11], ALL, ("smoothed",)),
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("library") / "kernels.so"
    with compiled_for_here():
        build_library([*REGIONS, *REQUANTIZED], DOMAIN, path, cache=KernelCache())
    return path


def sizes(region: Region) -> tuple[int, int, int]:
    return region.size("K"), region.size("N"), region.size("G")


@functools.cache
def constants(region: Region) -> dict[str, Array]:
    """All of the int4 numbers, and scales that differ by much."""
    k, n, group = sizes(region)
    rng = np.random.default_rng(k * 1000 + n)
    values = {
        "w": rng.integers(-8, 8, (k, n)),
        "ws": (rng.uniform(0.1, 1.5, (-(-k // group), n)) / np.sqrt(k)).astype(np.float32),
    }
    if region.anchor.endswith("QMatMulW4S8A8"):
        values["cs"] = values.pop("ws").max(0) / 127
        values["gs"] = rng.integers(-127, 128, (-(-k // group), n))
    for index, kind in enumerate(region.extras):
        if kind == "channel":
            values[f"extra{index}"] = rng.standard_normal(n).astype(np.float32)
    return values


def model_of(region: Region) -> bytes:
    function = dialect.region_function(region, DOMAIN, 21)
    values = constants(region)

    def value(name: str) -> ir.Value:
        if name not in values:
            dtype = ir.DataType.UINT8 if name in ("q", "yq") else ir.DataType.FLOAT
            last = {"q": region.size("K"), "s": 1, "ys": 1}.get(name, region.size("N"))
            return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(["m", last]))
        dtype = {"w": ir.DataType.INT4, "gs": ir.DataType.INT8}.get(name, ir.DataType.FLOAT)
        array = values[name].astype(dtype.numpy())
        tensor = ir.Tensor(array, dtype=dtype, name=name)
        return ir.Value(
            name=name, const_value=tensor, type=ir.TensorType(dtype), shape=ir.Shape(array.shape)
        )

    operands = [value(v.name or "") for v in function.inputs]
    results = [value(v.name or "") for v in function.outputs]
    for result, width in zip(results, region.widths, strict=False):
        result.shape = ir.Shape(["m", width])
    node = ir.Node(DOMAIN, region.name, operands, outputs=results)
    graph = ir.Graph(
        [v for v in operands if v.const_value is None], results, nodes=[node],
        initializers=[v for v in operands if v.const_value is not None],
        opset_imports={"": 21, DOMAIN: 1}, name="region",
    )  # fmt: skip
    return ir.to_proto(ir.Model(graph, ir_version=10, functions=[function])).SerializeToString()


@functools.cache
def session(
    region: Region, threads: int, library: Path | None = None, isa: Isa | None = None
) -> ort.InferenceSession:
    options = new_session_options()
    options.intra_op_num_threads = threads
    if library is not None:
        offer(options, library, isa)
    else:
        # Else ORT makes MatMulNBits of the body, which rounds activations again: to about 50 dB.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model_of(region), options)


def feeds(region: Region, rows: int, rng: np.random.Generator) -> dict[str, Array]:
    found = {
        "q": rng.integers(1, 256, (rows, region.size("K"))).astype(np.uint8),
        "s": rng.uniform(0.01, 0.02, (rows, 1)).astype(np.float32),
    }
    for index, kind in enumerate(region.extras):
        if kind == "tensor":
            shape = rows, region.size("N")
            found[f"extra{index}"] = rng.standard_normal(shape).astype(np.float32)
    return found


@each_isa("QMatMulW4A8")
@settings(deadline=None, max_examples=80)
@example(1, REGIONS[5], 0).via("one row")
@example(0, REGIONS[5], 0).via("an empty batch")
@example(9, REGIONS[4], 0).via("just over a tile")
@example(300, REGIONS[5], 0).via("several blocks of rows")
@example(1, REGIONS[9], 0).via("one row, two panels at a time")
@example(1, REGIONS[12], 0).via("one row of several results")
@example(130, REGIONS[12], 0).via("several results")
@given(st.integers(0, 40), st.sampled_from(REGIONS), st.integers(0, 2**32 - 1))
def test_against_its_body(library: Path, isa: Isa, rows: int, region: Region, seed: int) -> None:
    data = feeds(region, rows, np.random.default_rng(seed))
    wanted = session(region, 1).run(None, data)
    for threads in (1, 2):
        results = session(region, threads, library, isa).run(None, data)
        for want, got in zip(wanted, results, strict=True):
            assert got.shape == want.shape
            assert not got.size or sqnr(want, got) >= 60
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@each_isa("RequantizedQMatMulW4A8")
@settings(deadline=None, max_examples=60)
@example(1, REQUANTIZED[3], 0).via("one row")
@example(1, REQUANTIZED[9], 0).via("a row that does not lie on the stack with another")
@example(0, REQUANTIZED[3], 0).via("an empty batch")
@example(9, REQUANTIZED[2], 0).via("just over a tile")
@example(33, REQUANTIZED[3], 0).via("just enough rows for tasks of whole rows")
@example(300, REQUANTIZED[6], 0).via("tasks of whole rows, stored beside, times factors")
@example(300, REQUANTIZED[9], 0).via("tasks of a tile of rows each")
@example(300, REQUANTIZED[13], 0).via("tasks of whole rows, scales of two levels")
@example(100, REQUANTIZED[10], 0).via("large weights")
@example(100, REQUANTIZED[11], 0).via("large weights, stored beside")
@example(700, REQUANTIZED[10], 0).via("large weights and results")
@given(st.integers(0, 40), st.sampled_from(REQUANTIZED), st.integers(0, 2**32 - 1))
def test_a_result_that_is_quantized(
    library: Path, isa: Isa, rows: int, region: Region, seed: int
) -> None:
    """The floats are those of a product, which differ in their last bits: few integers by one."""
    data = feeds(region, rows, np.random.default_rng(seed))
    wanted = session(region, 1).run(None, data)
    for threads in (1, 2):
        results = session(region, threads, library, isa).run(None, data)
        for name, want, got in zip(region.outputs, wanted, results, strict=True):
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
            if name == "yq":
                difference = np.abs(got.astype(int) - want)
                assert difference.max(initial=0) <= 1
                assert (difference != 0).sum() <= 1 + got.size / 500
            else:
                np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@each_isa("RequantizedQMatMulW4A8")
@pytest.mark.parametrize("rows", [1, 9, 40])
@pytest.mark.parametrize("region", [REQUANTIZED[6], REQUANTIZED[13]], ids=lambda r: r.name)
def test_what_is_quantized_is_what_is_stored(
    library: Path, isa: Isa, region: Region, rows: int
) -> None:
    y, q, s = session(region, 2, library, isa).run(
        None, feeds(region, rows, np.random.default_rng(rows))
    )
    smoothed = y * constants(region)[f"extra{len(region.extras) - 1}"]
    np.testing.assert_allclose(s[:, 0], np.abs(smoothed).max(1) / 127, rtol=1e-6)
    assert np.abs((q.astype(np.float64) - 128) * s - smoothed).max() <= 0.5001 * s.max()


@each_isa("QMatMulW4A8")
@pytest.mark.parametrize("region", [r for r in REGIONS if not r.steps], ids=lambda r: r.name)
@pytest.mark.parametrize("extreme", [0, 1, 255])
def test_sums_are_exact(library: Path, isa: Isa, region: Region, extreme: int) -> None:
    """Nothing saturates where all activations are as large as they can be."""
    k, _, group = sizes(region)
    q = np.full((5, k), extreme, np.uint8)
    q[1::2] = np.random.default_rng(1).integers(0, 256, k)
    ones = np.ones((5, 1), np.float32)
    got = np.hstack(session(region, 1, library, isa).run(None, {"q": q, "s": ones}))
    values = constants(region)
    scales = values["ws"] if "ws" in values else values["gs"].astype("f4") * values["cs"]
    wide = values["w"] * np.repeat(scales.astype(np.float64), group, axis=0)[:k]
    want = (q.astype(np.float64) - 128) @ wide
    assert sqnr(want, got) >= 120


@pytest.mark.parametrize(
    ("region", "reason"),
    [
        (product(64, 4, 20), "groups of 20: kernels take multiples of 8, or all of K"),
        (product(1 << 16, 1 << 15, 32), "65536 x 32768 weights: kernels take up to 2^30"),
        (product(4, 4, 32, (), Step("Erf", (0,))), "no vector form of Erf"),
        (dataclasses.replace(product(64, 64, 32), widths=(48, 16)), "not all are multiples of 32"),
        (dataclasses.replace(product(64, 288, 32), widths=(32,) * 9), "9 results; at most 8"),
        (requantized(product(64, 4, 20)), "groups of 20: kernels take multiples of 8"),
        (requantized(product(64, 4097, 32)), "rows of more than 4096 are quantized later"),
        (requantized(product(64, 4, 32), ("y",)), "one result of floats is quantized"),
        (
            requantized(dataclasses.replace(product(64, 64, 32), widths=(32, 32))),
            "one result of floats is quantized",
        ),
    ],
)
def test_unsupported_regions_say_why(region: Region, reason: str) -> None:
    assert reason in str(x86.supports(region))


def packed(region: Region, isa: Isa) -> tuple[Array, Array]:
    """Weights and scales as native/qmatmul_w4.c lays them out."""
    (k, n, _), chunks, vectors = sizes(region), chunks_of(region, isa), w4_tile(isa).vectors
    values, panels = constants(region), -(-n // (16 * vectors))
    codes = np.full((chunks.padded_k, panels * vectors * 16), 8, np.uint8)
    codes[:k, :n] = values["w"] + 8
    eights = codes.reshape(chunks.eights, 2, 4, panels, vectors, 16)
    bytes_ = (eights[:, 0] | eights[:, 1] << 4).transpose(2, 0, 3, 4, 1)
    scales = np.zeros((chunks.groups, panels, vectors * 16), np.float32)
    scales.reshape(chunks.groups, -1)[:, :n] = values["ws"]
    return np.ascontiguousarray(bytes_).reshape(-1), scales.transpose(1, 0, 2).copy()


@pytest.mark.parametrize("isa", [AVX512_VNNI, AVX2], ids=lambda isa: isa.name)
@pytest.mark.parametrize("region", [r for r in REGIONS[:10] if not r.steps], ids=lambda r: r.name)
def test_each_layout(
    isa: Isa, region: Region, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loops of either unit, which read and write nothing beyond their operands."""
    if isa == AVX512_VNNI:
        monkeypatch.setattr(qmatmul_w4, "unit_of", lambda isa: PlainUnit())
    kernel = load({"f": qmatmul_w4.qmatmul_w4_function(region, isa)}, tmp_path, AVX2).f
    (k, n, _), chunks, guarded = sizes(region), chunks_of(region, isa), Guarded()
    weights, scales = packed(region, isa)
    rng = np.random.default_rng(3)
    for rows in (1, 2, 7, 13):
        a = np.zeros((rows, chunks.padded_k), np.int8)
        a[:, :k] = rng.integers(-128, 128, (rows, k))
        starts = -8 * a.reshape(rows, chunks.count, chunks.size).sum(2, dtype=np.int32)
        s = rng.uniform(0.5, 2, rows).astype(np.float32)
        y = guarded(np.full((rows, n), np.nan, np.float32))
        arrays = [*map(guarded, (a, starts.astype(np.int32), s, weights, scales)), y]
        kernel(*map(pointer, arrays), rows, 0, len(scales))
        group = chunks.size * chunks.per_group
        wide = np.repeat(constants(region)["ws"].astype(np.float64), group, axis=0)[:k]
        want = a[:, :k] @ (constants(region)["w"] * wide) * s[:, None]
        assert sqnr(want, y) >= 120
