"""The kernels of norms against float64 and against their function's body in ONNX Runtime.

q cannot always equal the body's: y is rounded differently in its last bits, so a value that lies at
a tie between two integers may fall on the other side.  It is one step at most, and only there.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from golden import sqnr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from instruction_sets import compiled_for_here, each_isa, each_raw_isa, offer
from raw_kernels import Guarded, load, pointer, quantize

from qcompiler.ir import dialect
from qcompiler.ir.region import Region
from qcompiler.session_options import new_session_options
from qcompiler.targets.library import KernelCache, build_library
from qcompiler.targets.x86 import Isa, supports
from qcompiler.targets.x86.families import norm_operands

DOMAIN = "qcompiler.00b0d1e6"
EPSILON = 1e-5


def region(anchor, k, outputs):
    attributes = (("epsilon", EPSILON),)
    return Region(anchor, (("K", k),), outputs=tuple(outputs), attributes=attributes)


def smoothed(anchor, k, outputs):
    return dataclasses.replace(region(anchor, k, outputs), extras=("channel",), flags=("smoothed",))


NORMS = [
    region("LayerNorm", 384, "yqs"),
    region("LayerNorm", 1, "yqs"),
    region("LayerNorm", 37, "y"),
    region("LayerNorm", 130, "qs"),
    region("LayerNorm", 1067, "yqs"),
    region("AddLayerNorm", 384, "xqs"),
    region("AddLayerNorm", 384, "qs"),
    region("AddLayerNorm", 63, "yqs"),
    region("AddLayerNorm", 5, "xy"),
    region("AddLayerNorm", 3000, "xyqs"),
    region("RMSNorm", 1, "y"),
    region("RMSNorm", 576, "qs"),
    region("RMSNorm", 79, "yqs"),
    region("AddRMSNorm", 576, "xqs"),
    region("AddRMSNorm", 100, "y"),
    region("AddRMSNorm", 17, "xyqs"),
    smoothed("AddLayerNorm", 384, "yqs"),
    smoothed("LayerNorm", 61, "qs"),
    smoothed("AddRMSNorm", 130, "xyqs"),
    smoothed("RMSNorm", 2051, "yqs"),
]


@functools.cache
def parameters(k: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(k)
    normal = {name: rng.standard_normal(k).astype(np.float32) for name in ("gamma", "beta")}
    return normal | {"smoothing": rng.uniform(0.1, 1, k).astype(np.float32)}


@functools.cache
def model_of(region: Region, rank: int) -> bytes:
    """One call of the region's function, dynamic in all dimensions but the last."""
    op, k = dialect.OPS[region.anchor], region.size("K")
    function = dialect.region_function(region, DOMAIN, 21)
    constants = parameters(k) | {"extra0": parameters(k)["smoothing"]}

    def value(name: str) -> ir.Value:
        if name in constants:
            tensor = ir.tensor(constants[name], name=name)
            return ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype),
                            shape=ir.Shape(tensor.shape))  # fmt: skip
        shape = [f"d{i}" for i in range(rank - 1)] + [1 if name == "s" else k]
        return ir.Value(name=name, type=ir.TensorType(op.type_of(name)), shape=ir.Shape(shape))

    operands = [value(v.name) for v in function.inputs]
    results = [value(v.name) for v in function.outputs]
    node = ir.Node(DOMAIN, region.name, operands, outputs=results)
    graph = ir.Graph([v for v in operands if v.const_value is None], results, nodes=[node],
                     initializers=[v for v in operands if v.const_value is not None],
                     opset_imports={"": 21, DOMAIN: 1}, name="norm")  # fmt: skip
    return ir.to_proto(ir.Model(graph, ir_version=10, functions=[function])).SerializeToString()


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("norms") / "kernels.so"
    with compiled_for_here():
        build_library(NORMS, DOMAIN, path, cache=KernelCache())
    return path


@functools.cache
def session(
    region: Region, rank: int, threads: int, library: Path | None, isa: Isa | None
) -> ort.InferenceSession:
    options = new_session_options()
    options.intra_op_num_threads = threads
    if library is not None:
        offer(options, library, isa)
    return ort.InferenceSession(model_of(region, rank), options)


def run(region, feeds, threads, library, isa=None):
    """The outputs by name."""
    rank = next(iter(feeds.values())).ndim
    values = session(region, rank, threads, library, isa).run(None, feeds)
    return dict(zip(region.outputs, values, strict=True))


def reference(region: Region, x: np.ndarray) -> np.ndarray:
    """Y in float64."""
    x, p = x.astype(np.float64), parameters(region.size("K"))
    if "LayerNorm" in region.anchor:
        c = x - x.mean(-1, keepdims=True)
        return c / np.sqrt((c * c).mean(-1, keepdims=True) + EPSILON) * p["gamma"] + p["beta"]
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * p["gamma"]


def check_integers(q, s, other_q, other_s, y) -> None:
    """Equal, but for one step where y lies at a tie."""
    np.testing.assert_allclose(s, other_s, rtol=2e-5)
    steps = q.astype(int) - other_q.astype(int)
    assert np.abs(steps).max(initial=0) <= 1
    from_tie = np.abs(np.abs(np.modf(y / other_s)[0]) - 0.5)
    assert from_tie[steps != 0].max(initial=0) < 2e-3
    assert np.count_nonzero(steps) <= 1 + steps.size / 500


def quantized(region, y):
    """What is quantized."""
    return y * parameters(region.size("K"))["smoothing"] if region.flags else y


def check(region, feeds, library, isa, floor_db=90.0, against_body=True) -> None:
    x = feeds["x"] if "x" in feeds else feeds["a"] + feeds["b"]
    y = reference(region, x)
    z = quantized(region, y)
    body = run(region, feeds, 1, None) if against_body else {}
    for threads in (1, 2):
        native = run(region, feeds, threads, library, isa)
        if "x" in native:
            np.testing.assert_array_equal(native["x"], x)
        if "y" in native and y.size:
            assert native["y"].shape == y.shape
            assert sqnr(y, native["y"]) >= floor_db
            assert not body or sqnr(body["y"], native["y"]) >= floor_db
        if "q" in native:
            q, s = quantize(z.astype(np.float32)) if z.size else (native["q"], native["s"])
            assert native["s"].shape == s.shape
            check_integers(native["q"], native["s"], q, s, z)
        if "q" in body:
            check_integers(native["q"], native["s"], body["q"], body["s"], z)
        if {"y", "q"} <= native.keys() and y.size:
            # What was quantized is the very y that was stored.
            q, s = quantize(quantized(region, native["y"]))
            np.testing.assert_array_equal(native["q"], q)
            np.testing.assert_array_equal(native["s"], s)


def feeds_of(region, shape, seed, scale=1.0, mean=0.0):
    rng = np.random.default_rng(seed)
    names = [n for n in dialect.OPS[region.anchor].inputs if n not in ("gamma", "beta")]
    shape = (*shape, region.size("K"))
    return {n: (rng.standard_normal(shape) * scale + mean).astype(np.float32) for n in names}


@each_isa("LayerNorm")
@settings(deadline=None, max_examples=150)
@example([1], NORMS[0], 0, 1.0).via("one row")
@example([0], NORMS[0], 0, 1.0).via("an empty batch")
@example([2, 0, 3], NORMS[5], 0, 1.0).via("an empty batch inside")
@example([259], NORMS[0], 0, 1.0).via("several tasks and a rest")
@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.sampled_from(NORMS),
       st.integers(0, 2**32 - 1), st.sampled_from([0.1, 1.0, 100.0]))  # fmt: skip
def test_norm(library, isa, shape, region, seed, scale):
    # With one element ORT divides what rounding left of nothing.
    feeds = feeds_of(region, shape, seed, scale)
    check(region, feeds, library, isa, against_body=region.size("K") > 1)


@each_isa("LayerNorm")
@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
def test_large_mean(library, isa, norm):
    # The body loses its digits here: ORT subtracts two squares.
    check(norm, feeds_of(norm, [13], 0, 1.0, 1e4), library, isa, against_body=False)


@each_isa("LayerNorm")
@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
def test_rows_off_centre_beside_others(library, isa, norm):
    """They are summed up once more; numbers of a row are the same whatever its neighbours."""
    means = np.array([0, 0.2, 0.4, 0.6, 0, 1, 3, 100, 0, 0, 1e4], np.float32)[:, None]
    feeds = {name: x + means for name, x in feeds_of(norm, [len(means)], 0).items()}
    check(norm, feeds, library, isa, against_body=False)
    shifted = {name: x + np.float32(50) * (means == 0) for name, x in feeds.items()}
    near, far = (run(norm, each, 1, library, isa) for each in (feeds, shifted))
    for name in norm.outputs:
        np.testing.assert_array_equal(near[name][means[:, 0] != 0], far[name][means[:, 0] != 0])


@each_isa("LayerNorm")
@pytest.mark.parametrize("norm", [NORMS[0], NORMS[4], NORMS[6], NORMS[9]], ids=str)
def test_squares_of_a_mean_may_leave_float32(library, isa, norm):
    """Those of deviations do not."""
    check(norm, feeds_of(norm, [9], 0, 1e17, 2e19), library, isa, against_body=False)


@each_isa("LayerNorm")
@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.name)
@pytest.mark.parametrize("value", [0.0, 1.0, 12345.678])
def test_rows_without_variance(library, isa, norm, value):
    feeds = {name: np.full_like(x, value) for name, x in feeds_of(norm, [7], 0).items()}
    native = run(norm, feeds, 2, library, isa)
    p = parameters(norm.size("K"))
    expected = p["beta"] if "LayerNorm" in norm.anchor else p["gamma"] * (value != 0)
    y = np.broadcast_to(expected, (7, norm.size("K")))
    tolerance = {"rtol": 1e-4, "atol": 1e-6}
    if "y" in native:
        np.testing.assert_allclose(native["y"], y, **tolerance)
    if "q" in native:
        z = quantized(norm, y)
        np.testing.assert_allclose((native["q"] - 128.0) * native["s"], z, atol=0.02)


@each_isa("LayerNorm")
def test_first_row_has_the_numbers_of_all_others(library, isa):
    norm = NORMS[4]  # of 1067: too long for groups, three vectors after the last 64
    x = feeds_of(norm, [5], 0)["x"]
    together = run(norm, {"x": x}, 1, library, isa)
    for i in range(5):
        for name, alone in run(norm, {"x": x[i : i + 1]}, 1, library, isa).items():
            np.testing.assert_array_equal(together[name][i : i + 1], alone)


@each_raw_isa("LayerNorm")
@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize("norm", [
    region("AddLayerNorm", 65, "xyqs"), region("RMSNorm", 15, "qs"),
    region("LayerNorm", 2051, "yqs"), smoothed("AddLayerNorm", 65, "yqs"),
], ids=lambda norm: norm.name)  # fmt: skip
def test_stays_within_its_arrays(tmp_path, isa, rows, norm):
    from qcompiler.targets.x86.norm import norm_function

    k, guarded = norm.size("K"), Guarded()
    library = load({"norm": norm_function(norm, isa)}, tmp_path, isa)
    arrays = feeds_of(norm, [rows], 0) | parameters(k)
    for name in norm.outputs:
        shape = (rows, 1 if name == "s" else k)
        arrays[name] = np.zeros(shape, np.uint8 if name == "q" else np.float32)
    placed = {name: guarded(arrays[name]) for name in norm_operands(norm)}
    library.norm(*map(pointer, placed.values()), rows)
    y = reference(norm, sum(feeds_of(norm, [rows], 0).values()))
    q, s = quantize(quantized(norm, y).astype(np.float32))
    assert np.abs(placed["q"].astype(int) - q).max() <= 1
    np.testing.assert_allclose(placed["s"], s, rtol=1e-5)


@each_isa("LayerNorm")
def test_wrong_shapes_are_refused(library, isa):
    feeds = feeds_of(NORMS[5], [3], 0)
    with pytest.raises(Exception, match=r"input b has shape \[2, 384\]; it must hold 1152 values"):
        run(NORMS[5], feeds | {"b": feeds["b"][:2]}, 1, library, isa)


@each_isa("LayerNorm")
@pytest.mark.parametrize("norm", [NORMS[0], NORMS[9], NORMS[11], NORMS[16], NORMS[18]], ids=str)
def test_operands_need_not_be_initializers(library, isa, norm):
    """Those with a default are none to ONNX Runtime, and each run asks for them."""
    proto = onnx.load_from_string(model_of(norm, 2))
    options = new_session_options()
    for constant in proto.graph.initializer:
        given = onnx.helper.make_tensor_value_info(constant.name, 1, constant.dims)
        proto.graph.input.append(given)
    offer(options, library, isa)
    feeds = feeds_of(norm, [3], 0)
    asked = ort.InferenceSession(proto.SerializeToString(), options)
    for value, expected in zip(
        asked.run(None, feeds), run(norm, feeds, 1, library, isa).values(), strict=True
    ):
        np.testing.assert_array_equal(value, expected)
    twice = {c.name: 2 * onnx.numpy_helper.to_array(c) for c in proto.graph.initializer}
    twice = {name: value for name, value in twice.items() if name.startswith("gamma")}
    changed = asked.run(None, feeds | twice)
    assert not np.array_equal(changed[-1], run(norm, feeds, 1, library, isa)[norm.outputs[-1]])


def test_what_has_no_kernel():
    assert "takes no epilogue" in str(supports(Region("LayerNorm", (("K", 8),), ("channel",))))
    without_factor = dataclasses.replace(smoothed("LayerNorm", 8, "yqs"), extras=())
    assert "takes no epilogue" in str(supports(without_factor))
    assert "q with s" in str(supports(Region("LayerNorm", (("K", 8),), outputs=("y", "q"))))
    assert supports(NORMS[0]) is None
