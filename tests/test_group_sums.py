"""The sums of groups of int8 activations: the kernel against its body, and that it is used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from golden import model_of, sqnr
from instruction_sets import compiled_for_here, each_isa, offer

import qcompiler
from qcompiler.ir import dialect
from qcompiler.ir.region import Region
from qcompiler.session_options import new_session_options
from qcompiler.targets.library import KernelCache, build_library
from qcompiler.targets.x86 import Isa

DOMAIN = "qcompiler.005d1e5a"
REGIONS = [Region("GroupSumsA8", (("G", g),), attributes=(("block_size", g),)) for g in (1, 24, 32)]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("library") / "kernels.so"
    with compiled_for_here():
        build_library(REGIONS, DOMAIN, path, cache=KernelCache())
    return path


def session(region: Region, library: Path | None, isa: Isa, threads: int) -> ort.InferenceSession:
    function = dialect.region_function(region, DOMAIN, 21)
    q, s, y = (
        ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([None, None, None]))
        for name, dtype in (("q", ir.DataType.UINT8), ("s", ir.DataType.FLOAT),
                            ("y", ir.DataType.FLOAT))
    )  # fmt: skip
    node = ir.Node(DOMAIN, region.name, [q, s], outputs=[y])
    graph = ir.Graph([q, s], [y], nodes=[node], opset_imports={"": 21, DOMAIN: 1}, name="sums")
    model = ir.to_proto(ir.Model(graph, ir_version=10, functions=[function]))
    options = new_session_options()
    options.intra_op_num_threads = threads
    if library is not None:
        offer(options, library, isa)
    return ort.InferenceSession(model.SerializeToString(), options)


@each_isa("GroupSumsA8")
@pytest.mark.parametrize("region", REGIONS, ids=lambda region: region.name)
@pytest.mark.parametrize("k", [1, 24, 31, 384, 4096])
def test_the_numbers_of_its_body(library: Path, isa: Isa, region: Region, k: int) -> None:
    rng = np.random.default_rng(k)
    for batch, rows in ((1, 1), (2, 7), (3, 0), (2, 130)):
        feeds = {
            "q": rng.integers(0, 256, (batch, rows, k)).astype(np.uint8),
            "s": rng.uniform(0.5, 2, (batch, rows, 1)).astype(np.float32),
        }
        (want,) = session(region, None, isa, 1).run(None, feeds)
        for threads in (1, 2):
            (got,) = session(region, library, isa, threads).run(None, feeds)
            np.testing.assert_array_equal(got, want)


def test_a_bundle_with_float_zero_points_has_them(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    text = "g (float[m,64] x) => (float[m,8] y) { y = MatMul (x, w) }"
    ir.save(model_of(text, {"w": weight}), tmp_path / "model.onnx")
    recipe = qcompiler.Recipe(zero_points="float", scales="int8")
    report = qcompiler.compile(
        tmp_path / "model.onnx", "x86-int4", tmp_path / "b", recipe=recipe, timing=False
    )
    ops = {each.op.split("_")[0] for each in report.decisions if each.action == "kernel"}
    assert ops == {"Quantize", "GroupSumsA8", "QMatMulW4S8A8"}
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    native, body = (
        qcompiler.load(tmp_path / "b", native=native).run(None, {"x": x})[0]
        for native in (True, False)
    )
    assert sqnr(body, native) >= 40  # where ORT makes MatMulNBits of the body, about 50 dB
