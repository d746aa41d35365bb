"""The whole way to a launch without a GPU: a stand-in for the driver notes what it is asked for."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from cuda_emulator import Emulated, needs_compiler
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from stand_in import ON_CPU, Bench, Driver, Gpu, StandInBackend

from qcompiler.ir import dialect
from qcompiler.ir.errors import ToolchainError
from qcompiler.ir.region import HALF, Region, Step
from qcompiler.session_options import new_session_options
from qcompiler.targets import cubin, cuda
from qcompiler.targets.cache import KernelCache
from qcompiler.targets.cuda.packing import pack, pack_scales
from qcompiler.targets.library import build_library

Array = NDArray[Any]

DOMAIN = "qcompiler.0c0da000"
H200 = Gpu()
L40S = Gpu(8, 9, "L40S", 99 * 1024)
A100 = Gpu(8, 0, "A100", 163 * 1024)
T4 = Gpu(7, 5, "T4", 64 * 1024)
B200 = Gpu(10, 0, "B200", 227 * 1024)

K, N = 1088, 200
BIAS_RELU = (Step("Add", (0, -1)), Step("Relu", (1,)))
RESIDUAL = (Step("Add", (0, -1)), Step("Add", (1, -2)))


def half(anchor: str, sizes: dict[str, int], *extras: Any, steps: tuple[Step, ...] = ()) -> Region:
    return Region(anchor, tuple(sizes.items()), extras, steps, flags=(HALF,))


W4 = half("QMatMulW4A16", {"K": K, "N": N, "G": 128}, "channel", steps=BIAS_RELU)
W4_ODD = half("QMatMulW4A16", {"K": 104, "N": 33, "G": 32})
W8 = half("QMatMulW8A8", {"K": K, "N": N}, "channel", "tensor", steps=RESIDUAL)
FP8 = half("QMatMulFp8", {"K": 144, "N": 40})
QUANTIZE = half("Quantize", {"K": K})
QUANTIZE_FP8 = half("QuantizeFp8", {"K": K})
GELU = half(
    "QMatMulW8A8", {"K": 64, "N": 16}, "channel",
    steps=(Step("Mul", (0, -1)), Step("Gelu", (1,)), Step("Tanh", (2,)),
           Step("Clip", (3,), (("max", 0.5),))),
)  # fmt: skip
SMALL = half("QMatMulW4A16", {"K": 1024, "N": 40, "G": 128}, "channel", steps=BIAS_RELU)
REGIONS = [W4, W4_ODD, W8, FP8, QUANTIZE, QUANTIZE_FP8, GELU, SMALL]

TYPES = {
    "QMatMulW4A16": {"x": np.float16, "y": np.float16},
    "QMatMulW8A8": {"q": np.uint8, "s": np.float32, "y": np.float16},
    "QMatMulFp8": {"q": ml_dtypes.float8_e4m3fn, "s": np.float32, "y": np.float16},
    "Quantize": {"x": np.float16, "q": np.uint8, "s": np.float32},
    "QuantizeFp8": {"x": np.float16, "q": ml_dtypes.float8_e4m3fn, "s": np.float32},
}


def constants_of(region: Region, seed: int = 0) -> dict[str, Array]:
    """Weights [K, N] and scales of a product."""
    rng, sizes = np.random.default_rng(seed), dict(region.sizes)
    if "N" not in sizes:
        return {}
    k, n = sizes["K"], sizes["N"]
    if region.anchor == "QMatMulW4A16":
        groups = -(-k // sizes["G"])
        return {
            "w": rng.integers(-8, 8, (k, n)).astype(ml_dtypes.int4),
            "ws": rng.uniform(0.001, 0.01, (groups, n)).astype(np.float16),
        }
    ws = rng.uniform(0.0001, 0.001, n).astype(np.float32)
    if region.anchor == "QMatMulFp8":
        return {"w": rng.standard_normal((k, n)).astype(ml_dtypes.float8_e4m3fn), "ws": ws}
    return {"w": rng.integers(-127, 128, (k, n)).astype(np.int8), "ws": ws}


def model_of(
    region: Region, constants: dict[str, Array], body: bool = False, **changed: list[Any]
) -> bytes:
    """One call of a region's op; `changed` gives inputs other shapes."""
    op, sizes, types = dialect.OPS[region.anchor], dict(region.sizes), TYPES[region.anchor]
    extras = [f"extra{i}" for i in range(len(region.extras))]
    columns = {"x": sizes["K"], "q": sizes["K"], "s": 1, "y": sizes.get("N")}
    shapes: dict[str, list[Any]] = {name: ["m", columns[name]] for name in types}
    for name, kind in zip(extras, region.extras, strict=True):
        shapes[name] = [sizes["N"]] if kind == "channel" else ["m", sizes["N"]]
    shapes |= changed
    values = [name for name in (*op.inputs, *extras) if name not in constants]

    def value(name: str) -> onnx.ValueInfoProto:
        dtype = types.get(name, constants_of(region).get(name, np.empty(0, np.float16)).dtype)
        return helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shapes[name]
        )

    graph = helper.make_graph(
        [
            helper.make_node(
                region.name, [*op.inputs, *extras], list(op.outputs), "n", domain=DOMAIN
            )
        ],
        "test",
        [value(name) for name in values],
        [value(name) for name in op.outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    if body:
        import onnx_ir as ir

        proto.functions.append(ir.to_proto(dialect.region_function(region, DOMAIN, 21)))
    return bytes(proto.SerializeToString())


def feed_of(region: Region, rows: int) -> dict[str, Array]:
    """Activations and extra operands."""
    rng, sizes = np.random.default_rng(1), dict(region.sizes)
    feed: dict[str, Array] = {}
    for name, dtype in TYPES[region.anchor].items():
        if name in dialect.OPS[region.anchor].inputs:
            shape = (rows, 1 if name == "s" else sizes["K"])
            wide = rng.standard_normal(shape)
            if dtype is np.uint8:
                wide = rng.integers(0, 256, shape)
            feed[name] = np.abs(wide).astype(dtype) if name == "s" else wide.astype(dtype)
    for i, kind in enumerate(region.extras):
        shape = (sizes["N"],) if kind == "channel" else (rows, sizes["N"])
        feed[f"extra{i}"] = rng.standard_normal(shape).astype(np.float16)
    return feed


def anchor_result(region: Region, constants: dict[str, Array], feed: dict[str, Array]) -> Array:
    """What a product is before its epilogue, in double precision."""
    w, ws = constants["w"].astype(np.float64), constants["ws"].astype(np.float64)
    if region.anchor == "QMatMulW4A16":
        wide = w * np.repeat(ws, region.size("G"), axis=0)[: w.shape[0]]
        return np.asarray(feed["x"].astype(np.float64) @ wide)
    q = feed["q"].astype(np.float64) - (128 if feed["q"].dtype == np.uint8 else 0)
    return np.asarray((q @ w) * feed["s"].astype(np.float64) * ws)


def with_epilogue(region: Region, y: Array, extras: list[Array]) -> Array:
    from scipy import special

    ops: dict[str, Any] = {
        "Add": np.add,
        "Mul": np.multiply,
        "Relu": lambda x: np.maximum(x, 0),
        "Gelu": lambda x: x * special.ndtr(x),
        "Tanh": np.tanh,
        "Clip": lambda x: np.minimum(x, 0.5),
    }
    values = [y]
    for step in region.steps:
        args = [values[arg] if arg >= 0 else extras[-1 - arg] for arg in step.args]
        values.append(ops[step.op](*args))
    return values[-1]


def expected_of(region: Region, constants: dict[str, Array], feed: dict[str, Array]) -> Array:
    extras = [feed[f"extra{i}"].astype(np.float64) for i in range(len(region.extras))]
    return with_epilogue(region, anchor_result(region, constants, feed), extras)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> KernelCache:
    return KernelCache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory, cache: KernelCache) -> Path:
    """A library whose GPU ops run in the CPU provider."""
    path = tmp_path_factory.mktemp("library") / "on_cpu.so"
    build_library(REGIONS, DOMAIN, path, cache=cache, arch=StandInBackend(ON_CPU))
    return path


@pytest.fixture(scope="module")
def with_twins(tmp_path_factory: pytest.TempPathFactory, cache: KernelCache) -> Path:
    """A library as it is shipped, but for the driver: on the CPU the twins run."""
    path = tmp_path_factory.mktemp("library") / "with_twins.so"
    build_library(REGIONS, DOMAIN, path, cache=cache, arch=StandInBackend())
    return path


@pytest.fixture(scope="session")
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drivers")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drivers: Path) -> Iterator[Bench]:
    monkeypatch.delenv("QCOMPILER_ISA", raising=False)
    bench = Bench(tmp_path, monkeypatch, drivers)
    yield bench
    bench.check()


def open_session(library: Path, model: bytes, options: Any = None) -> ort.InferenceSession:
    options = options or new_session_options()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_op(session: ort.InferenceSession, feed: dict[str, Array]) -> list[Array]:
    """As `session.run`, for float8 too, which it does not know."""
    values = {name: ort_value(array) for name, array in feed.items()}
    results = session.run_with_ort_values(None, values)
    return [as_array(result) for result in results]


def ort_value(array: Array) -> ort.OrtValue:
    if array.dtype != ml_dtypes.float8_e4m3fn:
        return ort.OrtValue.ortvalue_from_numpy(array)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
        array.view(np.uint8), TensorProto.FLOAT8E4M3FN
    )


def as_array(value: ort.OrtValue) -> Array:
    if value.element_type() != TensorProto.FLOAT8E4M3FN:
        return np.asarray(value.numpy())
    return memory(value.data_ptr(), ml_dtypes.float8_e4m3fn, *value.shape()).copy()


def memory(address: int, dtype: Any, *shape: int) -> Array:
    """Device memory, which is the process's."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = (ctypes.c_char * size).from_address(address)
    return np.frombuffer(buffer, np.uint8).view(dtype).reshape(shape)


def unpacked(region: Region, address: int) -> Array:
    """w [K, N] out of the packed bytes, by the formula of `targets/cuda/packing.py`."""
    layout, (k, n) = cuda.packing(region), np.ix_(range(region.size("K")), range(region.size("N")))
    packed = memory(address, np.uint8, layout.weight_bytes)
    tile = n // 16 * (layout.depth // layout.tile_depth) + k // layout.tile_depth
    c, d = n % 16, k % layout.tile_depth
    if layout.bits == 4:
        lane = c % 8 * 4 + d % 8 // 2
        words = packed.view("<u4")[tile * 128 + lane * 4 + d // 16]
        bit = 4 * (c // 8 + 2 * (d % 16 // 8)) + 16 * (d % 2)
        return (words >> bit.astype(np.uint32) & 15).astype(np.int64) - 8
    lane = c % 8 * 4 + d % 16 // 4
    dtype = np.int8 if region.anchor == "QMatMulW8A8" else ml_dtypes.float8_e4m3fn
    return packed[tile * 512 + lane * 16 + (c // 8 + 2 * (d // 16)) * 4 + d % 4].view(dtype)


def unpacked_scales(region: Region, address: int) -> Array:
    layout, n = cuda.packing(region), np.arange(region.size("N"))
    if layout.bits == 8:
        return memory(address, np.float32, layout.columns)[n]
    groups = -(-region.size("K") // region.size("G"))
    g, n = np.ix_(range(groups), n)
    index = (n // 16 * layout.groups + g) * 16 + n % 8 * 2 + n % 16 // 8
    return memory(address, np.float16, layout.scale_bytes // 2)[index]


def emulate(driver: Driver, region: Region, arch: str) -> None:
    """The kernels of a product, in numpy, from what they are given alone."""
    n, k = region.size("N"), region.size("K")

    def extras_of(given: dict[str, int], rows: int) -> list[Array]:
        return [
            memory(given[f"extra{i}"], np.float16, *((n,) if kind == "channel" else (rows, n)))
            for i, kind in enumerate(region.extras)
        ]

    def store(given: dict[str, int], y: Array, rows: int) -> None:
        result = with_epilogue(region, y, [e.astype(np.float64) for e in extras_of(given, rows)])
        memory(given["y"], np.float16, rows, n)[:] = result

    for launch in cuda.launches(region, arch):

        def run(values: list[int], grid: tuple[int, ...], launch: cuda.Launch = launch) -> None:
            given = dict(zip(launch.parameters, values, strict=True))
            rows, columns = given["rows"], -(-n // launch.block_columns)
            assert grid == (columns, -(-rows // launch.block_rows), launch.splits)
            feed = {
                name: memory(given[name], dtype, rows, 1 if name == "s" else k)
                for name, dtype in TYPES[region.anchor].items()
                if name in given and name != "y"
            }
            constants = {
                "w": unpacked(region, given["w"]),
                "ws": unpacked_scales(region, given["ws"]),
            }
            if launch.combine is None:
                store(given, anchor_result(region, constants, feed), rows)
                return
            partial = memory(given["workspace"], np.float32, launch.splits, rows, n)
            for split, part in enumerate(np.array_split(np.arange(k), launch.splits)):
                some = np.zeros_like(constants["w"])
                some[part] = constants["w"][part]
                partial[split] = anchor_result(region, constants | {"w": some}, feed)

        def combine(values: list[int], grid: tuple[int, ...], launch: cuda.Launch = launch) -> None:
            given = dict(zip(launch.combine_parameters, values, strict=True))
            rows = given["rows"]
            assert grid == (-(-rows * n // (4 * launch.threads)), 1, 1)
            store(
                given, memory(given["workspace"], np.float32, launch.splits, rows, n).sum(0), rows
            )

        driver.know(launch.symbol, len(launch.parameters), run)
        if launch.combine is not None:
            driver.know(launch.combine, len(launch.combine_parameters), combine)


@pytest.mark.parametrize("region", [W4, W4_ODD, W8, FP8], ids=lambda region: region.name)
def test_numbers(region: Region, on_cpu: Path, bench: Bench) -> None:
    """Everything a kernel is given is right, for any number of rows."""
    driver, constants = bench.driver(H200), constants_of(region)
    emulate(driver, region, "sm_90a")
    run = open_session(bench.library(on_cpu), model_of(region, constants))
    for rows in (1, 2, 8, 9, 16, 17, 64, 65, 256, 257, 500):
        feed = feed_of(region, rows)
        (y,) = run_op(run, feed)
        expected = expected_of(region, constants, feed)
        np.testing.assert_allclose(y, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("region", REGIONS, ids=lambda region: region.name)
@pytest.mark.parametrize("gpu", [H200, L40S, A100], ids=lambda gpu: gpu.name)
def test_which_kernel_runs(region: Region, gpu: Gpu, on_cpu: Path, bench: Bench) -> None:
    """The first launch that takes so many rows, as it asks to be launched."""
    arch = {9: "sm_90a", 8: f"sm_8{gpu.minor}"}[gpu.major]
    if arch not in cuda.archs_of(region):
        pytest.skip(f"{region.anchor} has no kernel for {arch}")
    driver = bench.driver(gpu)
    driver.know_all(region, arch)
    launches = cuda.launches(region, arch)
    run = open_session(bench.library(on_cpu), model_of(region, constants_of(region)))
    columns = region.size("N") if "N" in dict(region.sizes) else region.size("K")
    edges = [launch.max_rows for launch in launches if launch.max_rows is not None]
    for rows in [1, *edges, *(edge + 1 for edge in edges)]:
        # Many rows of one.
        feed = {
            name: np.broadcast_to(array, (rows, array.shape[1])).copy()
            if array.ndim == 2
            else array
            for name, array in feed_of(region, 1).items()
        }
        run_op(run, feed)
        wanted = next(x for x in launches if x.max_rows is None or rows <= x.max_rows)
        found = driver.launched()
        first = found[0]
        assert first.symbol == wanted.symbol
        assert (first.threads, first.shared_bytes) == (wanted.threads, wanted.shared_bytes)
        assert first.shared_limit == (wanted.shared_bytes if wanted.shared_bytes > 49152 else 0)
        blocks = -(-columns // wanted.block_columns), -(-rows // wanted.block_rows)
        assert first.grid == (*blocks, wanted.splits)
        assert first.arguments[len(wanted.parameters) - 1] == rows
        assert [one.symbol for one in found[1:]] == ([wanted.combine] if wanted.combine else [])
        for one in found:
            assert one.stream is None  # a CPU session has no stream
            assert one.context == 0x1000


def test_no_rows(on_cpu: Path, bench: Bench) -> None:
    driver = bench.driver(H200)
    run = open_session(bench.library(on_cpu), model_of(W4, constants_of(W4)))
    (y,) = run_op(run, feed_of(W4, 0))
    assert y.shape == (0, N)
    assert driver.launched() == []


def test_more_rows_than_a_grid_has_blocks(on_cpu: Path, bench: Bench) -> None:
    """Cut into calls, each of which starts where the one before ended."""
    driver = bench.driver(H200)
    driver.know_all(FP8, "sm_90a")
    run = open_session(bench.library(on_cpu), model_of(FP8, constants_of(FP8)))
    most = 65535 * cuda.launches(FP8, "sm_90a")[-1].block_rows
    rows = most + 5
    feed = {
        "q": np.zeros((rows, 144), ml_dtypes.float8_e4m3fn),
        "s": np.ones((rows, 1), np.float32),
    }
    run_op(run, feed)
    parameters = cuda.launches(FP8, "sm_90a")[0].parameters
    calls = driver.launched()
    firsts = [dict(zip(parameters, call.arguments, strict=False)) for call in calls]
    step = most // 16 * 16
    assert [first["rows"] for first in firsts] == [step, rows - step]
    assert firsts[1]["q"] - firsts[0]["q"] == step * 144
    assert firsts[1]["s"] - firsts[0]["s"] == step * 4
    assert firsts[1]["y"] - firsts[0]["y"] == step * 40 * 2
    assert firsts[1]["w"] == firsts[0]["w"]


@pytest.mark.parametrize("region", [W4, W4_ODD, W8, FP8], ids=lambda region: region.name)
def test_what_is_uploaded(region: Region, on_cpu: Path, bench: Bench) -> None:
    driver, constants = bench.driver(H200), constants_of(region)
    driver.know_all(region, "sm_90a")
    run = open_session(bench.library(on_cpu), model_of(region, constants))
    layout = cuda.packing(region)
    assert driver.get("used") == layout.weight_bytes + layout.scale_bytes
    run_op(run, feed_of(region, 1))
    launch = cuda.launches(region, "sm_90a")[0]
    given = dict(zip(launch.parameters, driver.launched()[0].arguments, strict=False))
    raw = constants["w"].view(np.uint8) if layout.bits == 8 else constants["w"].astype(np.int8)
    assert memory(given["w"], np.uint8, layout.weight_bytes).tobytes() == pack(raw, region)
    scales = memory(given["ws"], np.uint8, layout.scale_bytes).tobytes()
    assert scales == pack_scales(constants["ws"], region)
    del run
    assert (driver.get("used"), driver.get("allocations")) == (0, 0)


def test_two_sessions_and_threads(on_cpu: Path, bench: Bench) -> None:
    """Kernels are loaded once, weights are each session's own, and runs do not mix."""
    driver, library = bench.driver(H200), bench.library(on_cpu)
    emulate(driver, W4, "sm_90a")
    constants = [constants_of(W4, seed) for seed in range(2)]
    sessions = [open_session(library, model_of(W4, each)) for each in constants]
    assert driver.get("modules") == 1
    assert driver.get("allocations") == 4
    feeds = [feed_of(W4, rows) for rows in (1, 30, 300)]
    expected = [[run_op(run, feed)[0] for feed in feeds] for run in sessions]
    assert not np.array_equal(expected[0][0], expected[1][0])
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 6, 12):
            (y,) = run_op(sessions[i % 2], feeds[i // 2])
            if not np.array_equal(y, expected[i % 2][i // 2]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    del sessions[0]
    assert driver.get("allocations") == 2


def test_the_context_of_the_caller_is_used_and_kept(on_cpu: Path, bench: Bench) -> None:
    driver, context = bench.driver(H200), ctypes.c_void_p()
    driver.know_all(W4, "sm_90a")
    run = open_session(bench.library(on_cpu), model_of(W4, constants_of(W4)))
    raw = ctypes.CDLL(str(driver.path))
    raw.cuCtxPushCurrent_v2(ctypes.c_void_p(0x1000))
    before = driver.get("pushes")
    run_op(run, feed_of(W4, 1))
    assert driver.get("pushes") == before
    raw.cuCtxPushCurrent_v2(ctypes.c_void_p(0x9000))  # another one's
    run_op(run, feed_of(W4, 1))
    raw.cuCtxGetCurrent(ctypes.byref(context))
    assert context.value == 0x9000
    assert {launch.context for launch in driver.launched()} == {0x1000}


@needs_compiler
def test_generated_kernels_in_a_session(on_cpu: Path, bench: Bench, tmp_path: Path) -> None:
    """All but the GPU: ONNX Runtime, the glue, a driver, and the CUDA that TVM wrote, emulated."""
    driver, constants = bench.driver(H200), constants_of(SMALL)
    kernels = Emulated(cuda.source(SMALL, "sm_90a"), tmp_path)
    k, n = SMALL.size("K"), SMALL.size("N")
    layout = cuda.packing(SMALL)

    def array(name: str, address: int, rows: int, splits: int) -> Array:
        shapes: dict[str, tuple[Any, ...]] = {
            "x": (np.float16, rows, k),
            "w": (np.uint8, layout.weight_bytes),
            "ws": (np.uint8, layout.scale_bytes),
            "extra0": (np.float16, n),
            "y": (np.float16, rows, n),
            "workspace": (np.float32, splits, rows, n),
        }
        return memory(address, *shapes[name])

    for launch in cuda.launches(SMALL, "sm_90a"):
        both = [(launch.symbol, launch.parameters, launch.shared_bytes)]
        if launch.combine is not None:
            both.append((launch.combine, launch.combine_parameters, 0))
        for symbol, parameters, shared in both:

            def run(
                values: list[int], grid: tuple[int, int, int], symbol: str = symbol,
                parameters: tuple[str, ...] = parameters, shared: int = shared,
                launch: cuda.Launch = launch,
            ) -> None:  # fmt: skip
                given = dict(zip(parameters, values, strict=True))
                rows = given.pop("rows")
                arrays = {
                    name: array(name, address, rows, launch.splits)
                    for name, address in given.items()
                }
                kernels.kernel(symbol, grid, launch.threads, shared, arrays, rows)

            driver.know(symbol, len(parameters), run)
    run_session = open_session(bench.library(on_cpu), model_of(SMALL, constants))
    for rows in (1, 12):
        feed = feed_of(SMALL, rows)
        (y,) = run_op(run_session, feed)
        expected = expected_of(SMALL, constants, feed)
        np.testing.assert_allclose(y, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())
    symbols = [launch.symbol for launch in driver.launched()]
    assert len(set(symbols)) == len(symbols) > 1


@pytest.mark.parametrize("region", [FP8, QUANTIZE], ids=lambda region: region.name)
def test_cubins_have_the_symbols_that_are_asked_for(region: Region) -> None:
    try:
        compiler = cubin.find_cubin_compiler()
    except ToolchainError as error:
        pytest.skip(str(error))
    image = compiler.compile(cuda.source(region, "sm_90a"), "sm_90a")
    for launch in cuda.launches(region, "sm_90a"):
        assert b"\0" + launch.symbol.encode() + b"\0" in image
        assert launch.combine is None or b"\0" + launch.combine.encode() + b"\0" in image


# --- what cannot run --------------------------------------------------------------------------


def runs_body(library: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """What a library says while a session of it runs function bodies; nothing the second time."""
    constants, feed = constants_of(W4_ODD), feed_of(W4_ODD, 3)
    model = model_of(W4_ODD, constants, body=True)
    (y,) = run_op(open_session(library, model), feed)
    np.testing.assert_allclose(y, expected_of(W4_ODD, constants, feed), rtol=5e-3, atol=5e-3)
    told = capfd.readouterr().err
    open_session(library, model)
    assert capfd.readouterr().err == ""
    return told


SAID = f"{DOMAIN}: 8 of 8 ops run as their function bodies, without kernels: "


def test_no_driver(
    on_cpu: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QC_STAND_IN", "/nowhere/libcuda.so.1")
    told = runs_body(bench.library(on_cpu), capfd)
    assert told == SAID + "there is no NVIDIA driver (libcuda.so.1 cannot be loaded)\n"


def test_a_driver_too_old(on_cpu: Path, bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    bench.driver(H200).set("version", 12080)
    told = runs_body(bench.library(on_cpu), capfd)
    assert told == SAID + (
        "the NVIDIA driver is too old (for CUDA 12.8, the kernels were compiled with 13.0): "
        "update it\n"
    )


def test_a_driver_that_lacks_a_function(
    on_cpu: Path, bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    bench.driver(H200, flags=("-DOLD_DRIVER",))
    told = runs_body(bench.library(on_cpu), capfd)
    assert told == SAID + "the NVIDIA driver is too old (it has no cuCtxGetCurrent): update it\n"


def test_a_driver_that_fails(on_cpu: Path, bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    bench.driver(H200).let_fail("cuInit", 201)
    told = runs_body(bench.library(on_cpu), capfd)
    assert told == SAID + "the NVIDIA driver does not work (cuInit: CUDA_ERROR_INVALID_CONTEXT)\n"


def test_no_gpu(on_cpu: Path, bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    bench.driver()
    assert runs_body(bench.library(on_cpu), capfd) == SAID + "there is no NVIDIA GPU\n"


def test_a_gpu_below_sm_80(on_cpu: Path, bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    bench.driver(T4)
    told = runs_body(bench.library(on_cpu), capfd)
    assert told == SAID + "T4 has compute capability 7.5, and kernels need 8.0\n"


def test_no_cubin_for_the_gpu(
    on_cpu: Path, bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    bench.driver(B200)
    told = runs_body(bench.library(on_cpu), capfd)
    assert told == SAID + (
        "B200 has compute capability 10.0 and 227 KiB of shared memory, and there are kernels for "
        "sm_90a, sm_89, sm_80\n"
    )


def test_kernels_that_do_not_fit_the_gpu(
    on_cpu: Path, bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    """Only those that ask for less shared memory are registered."""
    needs = max(launch.shared_bytes for launch in cuda.launches(W4, "sm_80"))
    driver, library = bench.driver(Gpu(8, 6, "Small", needs - 1)), bench.library(on_cpu)
    driver.know_all(QUANTIZE, "sm_80")
    run_op(open_session(library, model_of(QUANTIZE, {})), feed_of(QUANTIZE, 2))
    assert len(driver.launched()) == 1
    assert "Small has compute capability 8.6 and" in capfd.readouterr().err
    constants, feed = constants_of(W4), feed_of(W4, 2)
    (y,) = run_op(open_session(library, model_of(W4, constants, body=True)), feed)
    assert driver.launched() == []
    np.testing.assert_allclose(y, expected_of(W4, constants, feed), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("isa", ["none", "sm_89", "sm_80"])
def test_isa_override(
    isa: str, on_cpu: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    driver, library = bench.driver(L40S), bench.library(on_cpu)
    driver.know_all(W4, "sm_80")
    monkeypatch.setenv("QCOMPILER_ISA", isa)
    run = open_session(library, model_of(W4, constants_of(W4), body=True))
    run_op(run, feed_of(W4, 2))
    assert len(driver.launched()) == (isa != "none")
    assert capfd.readouterr().err == ""


def test_an_unknown_isa(on_cpu: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.driver(H200)
    monkeypatch.setenv("QCOMPILER_ISA", "avx2")
    with pytest.raises(Exception, match="avx2 is no instruction set.* none, sm_90a, sm_89, sm_80"):
        open_session(bench.library(on_cpu), model_of(W4, constants_of(W4)))


def test_another_gpu_of_the_machine_has_kernels(on_cpu: Path, bench: Bench) -> None:
    """The name is registered, because GPU 1 can run it; a session on GPU 0 cannot be made."""
    bench.driver(T4, H200)
    message = (
        r"there is no kernel for GPU 0 \(T4, compute capability 7.5\), only for another of this "
        "machine: choose that as device_id, or set QCOMPILER_ISA=none"
    )
    with pytest.raises(Exception, match=f"{W4.name}: {message}"):
        open_session(bench.library(on_cpu), model_of(W4, constants_of(W4)))


def test_each_gpu_gets_its_own_kernels(on_cpu: Path, bench: Bench) -> None:
    driver = bench.driver(A100, H200)
    driver.know_all(W4, "sm_80")
    run = open_session(bench.library(on_cpu), model_of(W4, constants_of(W4)))
    run_op(run, feed_of(W4, 1))
    assert len(driver.launched()) == 1


# --- what goes wrong --------------------------------------------------------------------------


def test_out_of_memory(on_cpu: Path, bench: Bench) -> None:
    driver, layout = bench.driver(H200), cuda.packing(W4)
    driver.set("memory", 1000)
    message = (
        f"cannot allocate {layout.weight_bytes} bytes for weights on GPU 0, where 1000 of 1000 are "
        r"free: CUDA_ERROR_OUT_OF_MEMORY \(out of memory\)"
    )
    library = bench.library(on_cpu)
    with pytest.raises(Exception, match=f"{W4.name}: {message}"):
        open_session(library, model_of(W4, constants_of(W4)))
    driver.set("memory", layout.weight_bytes + 10)
    with pytest.raises(Exception, match=f"{layout.scale_bytes} bytes for scales .* where 10 of"):
        open_session(library, model_of(W4, constants_of(W4)))
    assert driver.get("allocations") == 0


@pytest.mark.parametrize(
    ("function", "code", "message"),
    [
        ("cuDevicePrimaryCtxRetain", 2, "cannot use GPU 0: CUDA_ERROR_OUT_OF_MEMORY"),
        ("cuModuleLoadData", 209,
         r"cannot load the sm_90a kernels on GPU 0 \(Stand-in\): CUDA_ERROR_NO_BINARY_FOR_GPU"),
        ("cuModuleGetFunction", 500, f"cannot find the kernel {W4.name}_.*: CUDA_ERROR_NOT_FOUND"),
        ("cuFuncSetAttribute", 1, r"cannot give .* \d+ bytes of shared memory: CUDA_ERROR_INVALID"),
        ("cuMemcpyHtoD_v2", 719, r"cannot copy \d+ bytes of weights to GPU 0: unknown error"),
    ],
)  # fmt: skip
def test_a_session_that_cannot_be_made(
    function: str, code: int, message: str, on_cpu: Path, bench: Bench
) -> None:
    driver, library = bench.driver(H200), bench.library(on_cpu)
    driver.let_fail(function, code)
    with pytest.raises(Exception, match=f"{DOMAIN}.{W4.name}: {message}"):
        open_session(library, model_of(W4, constants_of(W4)))
    assert driver.get("allocations") == 0
    driver.let_fail("", 0)
    open_session(library, model_of(W4, constants_of(W4)))


def test_a_launch_that_fails(on_cpu: Path, bench: Bench) -> None:
    driver = bench.driver(H200)
    driver.know_all(W4, "sm_90a")
    run = open_session(bench.library(on_cpu), model_of(W4, constants_of(W4)))
    launch = cuda.launches(W4, "sm_90a")[0]
    driver.let_fail("cuLaunchKernel", 1)
    with pytest.raises(
        Exception,
        match=rf"{W4.name}: cannot launch {launch.symbol} for 3 rows \(grid 13 x 1 x 1, "
        rf"{launch.threads} threads, {launch.shared_bytes} bytes of shared memory\): "
        r"CUDA_ERROR_INVALID_VALUE \(what it means\)",
    ):
        run_op(run, feed_of(W4, 3))
    driver.let_fail("", 0)
    run_op(run, feed_of(W4, 3))


@pytest.mark.parametrize(
    ("region", "changed", "message"),
    [
        (W4, {"x": ["m", "k"]}, r"input x has shape \[2, 1096\]; its last dimension must be 1088"),
        (W8, {"s": ["n", 1]}, r"input s has shape \[3, 1\]; it must hold 2 values"),
        (W4, {"extra0": ["n"]}, r"input extra0 has shape \[201\]; it must hold 200 values"),
        (W8, {"extra1": ["n", N]}, r"input extra1 has shape \[3, 200\]; it must hold 400 values"),
    ],
)
def test_wrong_shapes(
    region: Region, changed: dict[str, list[Any]], message: str, on_cpu: Path, with_twins: Path,
    bench: Bench,
) -> None:  # fmt: skip
    bench.driver(H200)
    ((name, _),) = changed.items()
    feed = feed_of(region, 2)
    wrong = [
        size + (8 if name == "x" else 1) if isinstance(axis, str) and axis != "m" else size
        for size, axis in zip(feed[name].shape, changed[name], strict=True)
    ]
    feed[name] = np.ones(wrong, feed[name].dtype)
    for library in (on_cpu, with_twins):
        run = open_session(
            bench.library(library), model_of(region, constants_of(region), **changed)
        )
        with pytest.raises(Exception, match=f"{region.name}: {message}"):
            run_op(run, feed)


def test_weights_must_be_initializers(on_cpu: Path, with_twins: Path, bench: Bench) -> None:
    bench.driver(H200)
    constants = constants_of(W8)
    for library in (on_cpu, with_twins):
        copy = bench.library(library)
        with pytest.raises(Exception, match="input w must be an initializer"):
            open_session(copy, model_of(W8, {"ws": constants["ws"]}, w=[K, N]))
        wrong = constants | {"ws": constants["ws"][:-1]}
        with pytest.raises(Exception, match=r"ws has shape \[199\]; it must be \[200\]"):
            open_session(copy, model_of(W8, wrong))


# --- twins ------------------------------------------------------------------------------------


@pytest.mark.parametrize("region", [W4, W4_ODD, W8, FP8, GELU], ids=lambda region: region.name)
@pytest.mark.parametrize("rows", [0, 1, 3, 40])
def test_twins_of_products(region: Region, rows: int, with_twins: Path, bench: Bench) -> None:
    """On a machine with a GPU a session on the CPU runs them."""
    driver, constants = bench.driver(H200), constants_of(region)
    run = open_session(bench.library(with_twins), model_of(region, constants))
    feed = feed_of(region, rows)
    (y,) = run_op(run, feed)
    expected = expected_of(region, constants, feed)
    np.testing.assert_allclose(y, expected, rtol=2e-3, atol=1e-3 * np.abs(expected).max(initial=1))
    assert driver.get("allocations") == 0
    assert driver.launched() == []


def test_twins_of_quantize(with_twins: Path, bench: Bench) -> None:
    bench.driver(H200)
    library = bench.library(with_twins)
    x = feed_of(QUANTIZE, 5)["x"]
    x[1] = 0
    x[2] = np.float16(6e-8)
    wide, largest = x.astype(np.float32), np.maximum(np.abs(x).astype(np.float32).max(1), 1e-20)
    for region, top in ((QUANTIZE, 127), (QUANTIZE_FP8, 448)):
        q, s = run_op(open_session(library, model_of(region, {})), {"x": x})
        scale = (largest / np.float32(top))[:, None]
        np.testing.assert_array_equal(s, scale)
        if region is QUANTIZE:
            np.testing.assert_array_equal(q, np.rint(wide / scale) + 128)
        else:
            np.testing.assert_array_equal(q, (wide / scale).astype(ml_dtypes.float8_e4m3fn))


def test_shapes_are_inferred(with_twins: Path, bench: Bench) -> None:
    bench.driver(H200)
    run = open_session(bench.library(with_twins), model_of(W8, constants_of(W8)))
    assert [output.shape for output in run.get_outputs()] == [["m", N]]


def test_without_the_provider_nothing_is_registered(
    tmp_path: Path, cache: KernelCache, bench: Bench, capfd: pytest.CaptureFixture[str]
) -> None:
    """The library as it is shipped, in an ONNX Runtime that has no CUDA."""
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has the CUDA provider")
    backend = StandInBackend()
    backend.flags = ()
    build_library(REGIONS, DOMAIN, tmp_path / "lib.so", cache=cache, arch=backend)
    assert runs_body(tmp_path / "lib.so", capfd) == SAID + (
        "this ONNX Runtime has no CUDAExecutionProvider: pip uninstall onnxruntime, then pip "
        "install 'onnxruntime-gpu[cuda,cudnn]'\n"
    )
