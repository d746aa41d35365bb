"""Products of int8 activations by int4 weights: kernels against exact sums and their bodies."""

from __future__ import annotations

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

from qcompiler.ir import dialect
from qcompiler.ir.region import Region, Step
from qcompiler.session_options import new_session_options
from qcompiler.targets import x86
from qcompiler.targets.library import KernelCache, build_library
from qcompiler.targets.x86 import Isa

DOMAIN = "qcompiler.00b4d1e5"
BIAS = Step("Add", (0, -1))
Array = NDArray[Any]


def product(k: int, n: int, group: int, extras: tuple[Any, ...] = (), *steps: Step) -> Region:
    return Region("QMatMulW4A8", (("K", k), ("N", n), ("G", group)), extras, steps)


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
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("library") / "kernels.so"
    with compiled_for_here():
        build_library(REGIONS, DOMAIN, path, cache=KernelCache())
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
    for index, kind in enumerate(region.extras):
        if kind == "channel":
            values[f"extra{index}"] = rng.standard_normal(n).astype(np.float32)
    return values


def model_of(region: Region) -> bytes:
    function = dialect.region_function(region, DOMAIN, 21)
    values = constants(region)

    def value(name: str) -> ir.Value:
        if name not in values:
            dtype = ir.DataType.UINT8 if name == "q" else ir.DataType.FLOAT
            last = {"q": region.size("K"), "s": 1}.get(name, region.size("N"))
            return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(["m", last]))
        dtype = ir.DataType.INT4 if name == "w" else ir.DataType.FLOAT
        array = values[name].astype(dtype.numpy())
        tensor = ir.Tensor(array, dtype=dtype, name=name)
        return ir.Value(
            name=name, const_value=tensor, type=ir.TensorType(dtype), shape=ir.Shape(array.shape)
        )

    operands, y = [value(v.name or "") for v in function.inputs], value("y")
    node = ir.Node(DOMAIN, region.name, operands, outputs=[y])
    graph = ir.Graph(
        [v for v in operands if v.const_value is None], [y], nodes=[node],
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
@given(st.integers(0, 40), st.sampled_from(REGIONS), st.integers(0, 2**32 - 1))
def test_against_its_body(library: Path, isa: Isa, rows: int, region: Region, seed: int) -> None:
    data = feeds(region, rows, np.random.default_rng(seed))
    (want,) = session(region, 1).run(None, data)
    for threads in (1, 2):
        (got,) = session(region, threads, library, isa).run(None, data)
        assert got.shape == want.shape
        assert not got.size or sqnr(want, got) >= 60
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@each_isa("QMatMulW4A8")
@pytest.mark.parametrize("region", [r for r in REGIONS if not r.steps], ids=lambda r: r.name)
@pytest.mark.parametrize("extreme", [0, 1, 255])
def test_sums_are_exact(library: Path, isa: Isa, region: Region, extreme: int) -> None:
    """Nothing saturates where all activations are as large as they can be."""
    k, _, group = sizes(region)
    q = np.full((5, k), extreme, np.uint8)
    q[1::2] = np.random.default_rng(1).integers(0, 256, k)
    ones = np.ones((5, 1), np.float32)
    (got,) = session(region, 1, library, isa).run(None, {"q": q, "s": ones})
    values = constants(region)
    wide = values["w"] * np.repeat(values["ws"].astype(np.float64), group, axis=0)[:k]
    want = (q.astype(np.float64) - 128) @ wide
    assert sqnr(want, got) >= 120


@pytest.mark.parametrize(
    ("region", "reason"),
    [
        (product(64, 4, 20), "groups of 20: kernels take multiples of 8, or all of K"),
        (product(1 << 16, 1 << 15, 32), "65536 x 32768 weights: kernels take up to 2^30"),
        (product(4, 4, 32, (), Step("Erf", (0,))), "no vector form of Erf"),
    ],
)
def test_unsupported_regions_say_why(region: Region, reason: str) -> None:
    assert reason in str(x86.supports(region))
