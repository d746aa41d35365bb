"""Norms for GPUs in a library: how they are launched, and their twins on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from cuda_emulator import Emulated, kernels_of, needs_compiler
from cuda_library import memory, open_session, run_op
from stand_in import Bench, Gpu, StandInBackend, build_for_cpu
from test_cuda_norms import body_of, norm, operands

from qcompiler.ir import dialect
from qcompiler.ir.region import Region
from qcompiler.targets import cuda
from qcompiler.targets.cache import KernelCache
from qcompiler.targets.library import build_library

DOMAIN = "qcompiler.0c0da001"
REGIONS = [
    norm("LayerNorm", 384, "y", "q", "s"),
    norm("AddLayerNorm", 200, "x", "q", "s", smoothed=True),
    norm("RMSNorm", 576, "q", "s"),
    norm("AddRMSNorm", 576, "x", "y", "q", "s"),
    norm("AddLayerNormFp8", 64, "y", "q", "s"),
    norm("RMSNormFp8", 64, "y", "q", "s"),
]
ids = pytest.mark.parametrize("region", REGIONS, ids=lambda region: region.name)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One whose ops run in the CPU provider, and one as it is shipped, with twins."""
    folder = tmp_path_factory.mktemp("libraries")
    cache, made = KernelCache(folder / "cache"), {n: folder / f"{n}.so" for n in ("gpu", "twins")}
    build_for_cpu(made["gpu"], REGIONS, DOMAIN, cache)
    build_library(REGIONS, DOMAIN, made["twins"], cache=cache, arch=StandInBackend())
    return made


def session(library: Path, region: Region) -> ort.InferenceSession:
    op = dialect.OPS[region.anchor]
    names = [*op.inputs, *(f"extra{i}" for i in range(len(region.extras)))]
    kind = ir.TensorType(ir.DataType.FLOAT16)
    columns = {name: ["m", region.size("K")] for name in ("x", "a", "b")}
    inputs = [
        ir.Value(name=name, type=kind, shape=ir.Shape(columns.get(name, [None]))) for name in names
    ]
    results = [
        ir.Value(name=f"{name}_made", type=ir.TensorType(op.type_of(name, region.flags)))
        for name in region.outputs
    ]
    node = ir.Node(DOMAIN, region.name, inputs, outputs=results)
    graph = ir.Graph(inputs, results, nodes=[node], opset_imports={"": 21, DOMAIN: 1}, name="g")
    return open_session(library, ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())


def feed_of(region: Region, rows: int) -> dict[str, np.ndarray]:
    given = operands(region, rows)
    op = dialect.OPS[region.anchor]
    return {name: given[name] for name in (*op.inputs, *(["extra0"] if region.extras else []))}


@ids
def test_twins(region: Region, libraries, bench: Bench) -> None:
    bench.driver(Gpu())
    run = session(bench.library(libraries["twins"]), region)
    for rows in (2, 5):
        feed = feed_of(region, rows)
        results = dict(zip(region.outputs, run_op(run, feed), strict=True))
        if region.anchor.endswith("Fp8"):
            assert results["q"].astype(np.float32).max() == 448
            continue
        for name, wanted in zip(region.outputs, body_of(region, feed), strict=True):
            wide = wanted.astype(np.float64)
            error = np.abs(results[name].astype(np.float64) - wide)
            assert (error <= (1 if name == "q" else 2.0**-9 * np.abs(wide) + 1e-4)).all(), name


@ids
def test_what_is_launched(region: Region, libraries, bench: Bench) -> None:
    driver = bench.driver(Gpu())
    driver.know_all(region, "sm_90a")
    run = session(bench.library(libraries["gpu"]), region)
    for rows, launch in zip((2, 32769), cuda.launches(region, "sm_90a"), strict=True):
        one = feed_of(region, 2)
        feed = {
            name: np.resize(array, (rows, array.shape[1])) if array.ndim == 2 else array
            for name, array in one.items()
        }
        run_op(run, feed)
        (launched,) = driver.launched()
        assert launched.symbol == launch.symbol
        assert launched.grid == (1, -(-rows // launch.block_rows), 1)
        assert (launched.threads, launched.shared_bytes) == (launch.threads, launch.shared_bytes)
        assert launched.arguments[len(launch.parameters) - 1] == rows


@needs_compiler
@pytest.mark.parametrize("region", [REGIONS[1], REGIONS[5]], ids=lambda region: region.name)
def test_generated_kernels_in_a_session(region: Region, libraries, bench: Bench, tmp_path) -> None:
    """ONNX Runtime, the glue, a driver, and the CUDA that TVM wrote, emulated."""
    driver, launch = bench.driver(Gpu()), cuda.launches(region, "sm_90a")[0]
    source, only = cuda.source(region, "sm_90a"), kernels_of(launch)
    program = Emulated(source, tmp_path, region.outputs, only)
    kinds = {"q": np.uint8, "s": np.float32}

    def compute(values: list[int], grid: tuple[int, ...]) -> None:
        given, k = dict(zip(launch.parameters, values, strict=True)), region.size("K")
        rows = given.pop("rows")
        shapes = {"s": (rows, 1), "gamma": (k,), "beta": (k,), "extra0": (k,)}
        arrays = {
            name: memory(address, kinds.get(name, np.float16), *shapes.get(name, (rows, k)))
            for name, address in given.items()
        }
        made = {name: array.copy() for name, array in arrays.items()}
        program.run(launch, k, made, rows)
        for name in region.outputs:
            arrays[name][...] = made[name]

    for one in cuda.launches(region, "sm_90a"):
        driver.know(one.symbol, len(one.parameters), compute if one == launch else None)
    feed = feed_of(region, 3)
    sessions = [session(bench.library(libraries[name]), region) for name in ("gpu", "twins")]
    # The memory of results is a session's, to be used again.
    on_gpu, twins = ([array.copy() for array in run_op(run, feed)] for run in sessions)
    bench.check()
    for name, got, wanted in zip(region.outputs, on_gpu, twins, strict=True):
        steps = 1 if name == "q" and not region.anchor.endswith("Fp8") else 0
        wide = wanted.astype(np.float64)
        relative = 2.0**-3 if name == "q" else 2.0**-9
        error = np.abs(got.astype(np.float64) - wide)
        assert (error <= steps + relative * np.abs(wide) + 1e-4).all(), name


def test_wrong_operands_are_named(libraries, bench: Bench) -> None:
    region = REGIONS[1]
    bench.driver(Gpu()).know_all(region, "sm_90a")
    for name, bad in (("b", (3, 200)), ("beta", (199,)), ("extra0", (1,))):
        feed = feed_of(region, 2) | {name: np.zeros(bad, np.float16)}
        for library in libraries.values():
            with pytest.raises(Exception, match=rf"{region.name}: .*{name}"):
                session(bench.library(library), region).run(None, feed)


def test_nothing_of_a_region_without_rows(libraries, bench: Bench) -> None:
    driver = bench.driver(Gpu())
    driver.know_all(REGIONS[0], "sm_90a")
    feed = feed_of(REGIONS[0], 2)
    feed["x"] = feed["x"][:0]
    results = session(bench.library(libraries["gpu"]), REGIONS[0]).run(None, feed)
    assert [array.shape for array in results] == [(0, 384), (0, 384), (0, 1)]
    assert driver.launched() == []
