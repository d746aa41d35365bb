"""Convolutions in libraries for GPUs: twins, launches, and the generated kernels in a session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from cuda_emulator import Emulated, needs_compiler
from cuda_images import BIAS, RESIDUAL, Array, Conv
from cuda_library import DOMAIN, memory, open_session
from onnx import TensorProto, helper, numpy_helper
from stand_in import Bench, Gpu, StandInBackend, build_for_cpu

from qcompiler.ir import dialect
from qcompiler.ir.region import HALF
from qcompiler.targets import cuda
from qcompiler.targets.cache import KernelCache
from qcompiler.targets.cuda.packing import conv_matrix, image_columns, pack, pack_scales
from qcompiler.targets.library import build_library

CONVS = [
    Conv(20, 40, steps=BIAS, flags=(HALF,)),
    Conv(130, 24, (3, 2), (2, 0, 1, 1), (2, 1), (1, 2), steps=RESIDUAL, flags=(HALF,)),
    Conv(20, 40, group=2, steps=BIAS, flags=(HALF,), made=(1, 2, 0, 3)),
    Conv(
        144,
        24,
        (3, 2),
        (2, 0, 1, 1),
        (2, 1),
        (1, 2),
        steps=RESIDUAL,
        flags=(HALF,),
        group=2,
        made=(0, 1, 1, 0),
        outputs=("y", "made"),
    ),
    Conv(36, 36, steps=RESIDUAL, flags=(HALF,), group=36, made=(1, 1, 1, 1), outputs=("y", "made")),
]
PLAIN = Conv(16, 1, (1, 1), (0, 0, 0, 0), flags=(HALF,))
SHAPE = (2, 9, 11)
ids = pytest.mark.parametrize("conv", CONVS, ids=lambda conv: conv.region.name)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One whose ops run in the CPU provider, and one as it is shipped, with twins."""
    folder = tmp_path_factory.mktemp("libraries")
    cache, made = KernelCache(folder / "cache"), {n: folder / f"{n}.so" for n in ("gpu", "twins")}
    regions = [region for conv in (*CONVS, PLAIN) for region in (conv.region, conv.image)]
    build_for_cpu(made["gpu"], regions, DOMAIN, cache)
    build_library(regions, DOMAIN, made["twins"], cache=cache, arch=StandInBackend())
    return made


def model_of(conv: Conv, given: dict[str, Array], body: bool = False) -> bytes:
    """q = QuantizeImage(x, s, z); y = QConvW8A8(q, s, z, w, ws, extras...), or as an image."""
    extras = [name for name in given if name.startswith("extra")]
    half, byte = TensorProto.FLOAT16, TensorProto.UINT8
    nodes = [
        helper.make_node(conv.image.name, ["x", "s", "z"], ["q"], domain=DOMAIN),
        helper.make_node(
            conv.region.name,
            ["q", *constant_names(given), *extras],
            names_of(conv),
            domain=DOMAIN,
        ),
    ]
    any_shape = ["a", "b", "c", "d"]
    inputs = [helper.make_tensor_value_info("x", half, ["e", "f", "g", "h"])]
    inputs += [
        helper.make_tensor_value_info(name, half, given[name].shape if name == "extra0" else None)
        for name in extras
    ]
    outputs = [
        helper.make_tensor_value_info("q", byte, any_shape),
        *(
            helper.make_tensor_value_info(
                name, half if name == "y" else byte, [f"{name}{i}" for i in range(4)]
            )
            for name in names_of(conv)
        ),
    ]
    constants = [numpy_helper.from_array(np.asarray(given[n]), n) for n in constant_names(given)]
    graph = helper.make_graph(nodes, "test", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    proto: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    if body:
        for region in (conv.image, conv.region):
            function = dialect.region_function(region, DOMAIN, 21)
            proto.functions.append(ir.to_proto(function))
    return bytes(proto.SerializeToString())


def constant_names(given: dict[str, Array]) -> list[str]:
    return [name for name in ("s", "z", "w", "ws", "t", "u") if name in given]


def names_of(conv: Conv) -> list[str]:
    """What the convolution makes."""
    return list(conv.region.outputs or ("y",))


def shapes_of(conv: Conv, shape: tuple[int, int, int]) -> list[tuple[int, ...]]:
    shapes = {"y": conv.result(shape)}
    if conv.made is not None:
        shapes["made"] = conv.result_image(shape)
    return [conv.stored(shape), *(shapes[name] for name in names_of(conv))]


def feed_of(given: dict[str, Array]) -> dict[str, Array]:
    return {name: given[name] for name in given if name == "x" or name.startswith("extra")}


def expected_of(conv: Conv, given: dict[str, Array]) -> list[Array]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        model_of(conv, given, body=True), options, providers=["CPUExecutionProvider"]
    )
    return [np.asarray(result) for result in session.run(None, feed_of(given))]


def assert_close(results: list[Array], expected: list[Array]) -> None:
    np.testing.assert_array_equal(results[0], expected[0])
    for result, wanted in zip(results[1:], expected[1:], strict=True):
        # Roundings of float32 on the way to float16: bodies round what they make before a step.
        wide = wanted.astype(np.float64)
        error = np.abs(result.astype(np.float64) - wide)
        if wanted.dtype == np.uint8:
            assert error.max() <= 1
            assert (error > 0).mean() < 0.05
            continue
        assert (error <= 2.0**-9 * np.abs(wide) + 2.0**-9 * np.abs(wide).max()).all(), error.max()


@ids
def test_twins_are_the_bodies(conv: Conv, libraries, bench: Bench) -> None:
    driver = bench.driver(Gpu())
    library = bench.library(libraries["twins"])
    for shape in (SHAPE, (1, 8, 8)):
        given = conv.operands(shape)
        given["x"][0, 0, 0, :2] = np.nan, np.inf
        run = open_session(library, model_of(conv, given))
        assert_close(run.run(None, feed_of(given)), expected_of(conv, given))
    assert driver.launched() == []


@ids
@pytest.mark.parametrize("count", [1, 2, 40])
def test_what_is_launched(conv: Conv, count: int, libraries, bench: Bench) -> None:
    driver = bench.driver(Gpu())
    for region in (conv.image, conv.region):
        driver.know_all(region, "sm_90a")
    shape = (count, *SHAPE[1:])
    given = conv.operands(shape)
    run = open_session(bench.library(libraries["gpu"]), model_of(conv, given))
    results = run.run(None, feed_of(given))
    assert [result.shape for result in results] == shapes_of(conv, shape)
    q = results[0]
    image, *others = driver.launched()
    (planned,) = cuda.launches(conv.image, "sm_90a")
    pixels = count * q.shape[1] * q.shape[2]
    assert image.grid == (-(-conv.channels // 64), -(-pixels // 128), 1)
    assert given_to(planned.parameters, image, "height", "rows", "width") == (9, pixels, 11)
    rows = int(np.prod(conv.result(shape))) // conv.columns
    launches = cuda.launches(conv.region, "sm_90a")
    wanted = next(x for x in launches if x.max_rows is None or rows <= x.max_rows)
    assert [one.symbol for one in others] == [wanted.symbol, *filter(None, [wanted.combine])]
    assert others[0].grid == (1, -(-rows // wanted.block_rows), wanted.splits)
    sizes = given_to(wanted.parameters, others[0], "height", "rows", "width")
    assert sizes == (q.shape[1], rows, q.shape[2])
    combined = -(-rows * image_columns(conv.region) // (4 * wanted.threads)), 1, 1
    assert [one.grid for one in others[1:]] == [combined] * (wanted.combine is not None)
    matrix = conv_matrix(given["w"], conv.region)
    packed = {"w": pack(matrix, conv.region)}
    scales = pack_scales(
        given["ws"] * given["s"], conv.region, w=matrix, zero=int(given["z"]),
        result=(float(given["t"]), int(given["u"])) if "t" in given else None,
    )  # fmt: skip
    last = (wanted.combine_parameters, others[-1]) if wanted.combine else (wanted.parameters, image)
    (w,) = given_to(wanted.parameters, others[0], "w")
    assert memory(w, np.uint8, len(packed["w"])).tobytes() == packed["w"]
    (ws,) = given_to(last[0], others[-1], "ws")
    assert memory(ws, np.uint8, len(scales)).tobytes() == scales


def given_to(parameters: tuple[str, ...], launched: Any, *names: str) -> tuple[int, ...]:
    given = dict(zip(parameters, launched.arguments, strict=False))
    return tuple(given[name] for name in names)


@needs_compiler
@ids
def test_generated_kernels_in_a_session(conv: Conv, libraries, bench: Bench, tmp_path) -> None:
    """ONNX Runtime, the glue, a driver, and the CUDA that TVM wrote, emulated."""
    driver, given = bench.driver(Gpu()), conv.operands(SHAPE)
    q, y = conv.stored(SHAPE), conv.result(SHAPE)
    layout = cuda.packing(conv.region)
    rows, sizes = y[0] * y[2] * y[3], ("height", "rows", "width")
    launch = next(x for x in cuda.launches(conv.region, "sm_80") if rows <= (x.max_rows or rows))
    shapes: dict[str, tuple[Any, ...]] = {
        "x": (np.float16, *given["x"].shape), "s": (np.float32, 1), "z": (np.uint8, 1),
        "q": (np.uint8, *q), "w": (np.uint8, layout.weight_bytes),
        "ws": (np.uint8, layout.scale_bytes), "extra0": (np.float16, conv.columns),
        "extra1": (np.float16, *y), "y": (np.float16, *y),
        "workspace": (np.int32, launch.splits, rows, image_columns(conv.region)),
    }  # fmt: skip
    if conv.made is not None:
        shapes["made"] = (np.uint8, *conv.result_image(SHAPE))

    sources = {one: cuda.source(one, "sm_80") for one in (conv.image, conv.region)}

    def run_of(
        region, symbol: str, parameters: tuple[str, ...], made_names: list[str], shared: int
    ) -> Any:
        folder = tmp_path / symbol
        folder.mkdir()

        def compute(values: list[int], grid: tuple[int, int, int]) -> None:
            program = Emulated(sources[region], folder, made_names, only=[symbol])
            known = dict(zip(parameters, values, strict=True))
            numbers = {name: known.pop(name) for name in sizes}
            arrays = {name: memory(at, *shapes[name]) for name, at in known.items()}
            made = {name: array.copy() for name, array in arrays.items()}
            program.kernel(symbol, grid, 128, shared, made, numbers.pop("rows"), **numbers)
            for result in made_names:
                arrays[result][...] = made[result]

        return compute

    (image,) = cuda.launches(conv.image, "sm_80")
    kernels = [
        (conv.image, image.symbol, image.parameters, ["q"], image.shared_bytes),
        (conv.region, launch.symbol, launch.parameters,
         ["workspace"] if launch.combine else names_of(conv), launch.shared_bytes),
    ]  # fmt: skip
    if launch.combine:
        kernels.append((conv.region, launch.combine, launch.combine_parameters, names_of(conv), 0))
    runs = {kernel[1]: run_of(*kernel) for kernel in kernels}
    for region in (conv.image, conv.region):
        driver.know_all(region, "sm_90a", runs)
    run = open_session(bench.library(libraries["gpu"]), model_of(conv, given))
    results = [array.copy() for array in run.run(None, feed_of(given))]
    bench.check()
    assert_close(results, expected_of(conv, given))


@ids
def test_no_images(conv: Conv, libraries, bench: Bench) -> None:
    driver = bench.driver(Gpu())
    given = conv.operands((0, 9, 11))
    for library in libraries.values():
        run = open_session(bench.library(library), model_of(conv, given))
        results = run.run(None, feed_of(given))
        assert [result.shape for result in results] == shapes_of(conv, (0, 9, 11))
    assert driver.launched() == []


def test_more_images_than_a_grid_has_blocks(libraries, bench: Bench) -> None:
    """Cut into calls of whole images, each of which starts where the one before ended."""
    driver, shape = bench.driver(Gpu()), (33, 512, 512)
    for region in (PLAIN.image, PLAIN.region):
        driver.know_all(region, "sm_90a")
    given = PLAIN.operands((1, 1, 1))
    run = open_session(bench.library(libraries["gpu"]), model_of(PLAIN, given))
    run.run(["y"], {"x": np.zeros((shape[0], 16, *shape[1:]), np.float16)})
    most, pixels = 65535 * 128 // 512**2, 512**2
    launched = driver.launched()
    for region, steps in ((PLAIN.image, {"x": 32, "q": 16}), (PLAIN.region, {"q": 16, "y": 2})):
        launch = cuda.launches(region, "sm_90a")[-1]
        calls, parameters = [x for x in launched if x.symbol == launch.symbol], launch.parameters
        rows = [given_to(parameters, call, "rows")[0] for call in calls]
        assert rows == [most * pixels, (33 - most) * pixels]
        for name, size in steps.items():
            first, second = (given_to(parameters, call, name)[0] for call in calls)
            assert second - first == most * pixels * size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((2, 19, 9, 11), "f2")}, r"input x has shape \[2, 19, 9, 11\]; it must be"),
        ({"x": np.zeros((2, 20, 0, 11), "f2")}, "its images are smaller than the kernel"),
        ({"extra0": np.zeros((39, 1, 1), "f2")}, "extra0"),
    ],
)
def test_wrong_operands_are_named(change, message, libraries, bench: Bench) -> None:
    conv, driver = CONVS[0], bench.driver(Gpu())
    for region in (conv.image, conv.region):
        driver.know_all(region, "sm_90a")
    given = conv.operands(SHAPE)
    model = model_of(conv, given)
    for library in libraries.values():
        run = open_session(bench.library(library), model)
        with pytest.raises(Exception, match=message):
            run.run(None, feed_of(given) | change)


def test_what_is_no_constant_is_said(libraries, bench: Bench) -> None:
    conv = CONVS[0]
    bench.driver(Gpu())
    proto = onnx.load_from_string(model_of(conv, conv.operands(SHAPE)))
    kept = [tensor for tensor in proto.graph.initializer if tensor.name != "z"]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    proto.graph.input.append(helper.make_tensor_value_info("z", TensorProto.UINT8, []))
    for library in libraries.values():
        with pytest.raises(Exception, match="input z must be an initializer"):
            open_session(bench.library(library), proto.SerializeToString())
