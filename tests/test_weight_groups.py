"""Bits and groups of weights as a recipe asks for them, from compile to ONNX Runtime."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from correlated_rows import FEEDS, K, rows
from golden import run, sqnr
from two_products import TEXT, N, W, model

import qcompiler
from qcompiler.targets.catalog import TARGETS

pytestmark = pytest.mark.usefixtures("own_cache")
RNG = np.random.default_rng(2)


@pytest.mark.parametrize("target", ["arm-int4", "cuda-int4"])
@pytest.mark.parametrize(("group", "block"), [(32, 32), (0, 128)])
@pytest.mark.parametrize("rounding", ["nearest", "gptq", "awq"])
def test_eight_bits_in_groups(tmp_path, target, group, block, rounding):
    """Of float activations: ONNX Runtime's own op, whose values a file for it alone has too."""
    weights = {"v": np.tile(W["v"], (5, 1))[:300] / 2, "w": W["w"]}
    text = TEXT.replace("[n,64]", "[n,300]")
    feeds = [{"x": np.tile(rows(seed), 5)[:, :300]} for seed in range(3)]
    rule = {"op": "MatMul", "precision": "int8", "activation": "float", "group_size": group}
    facts = {
        "recipe": qcompiler.Recipe(nodes=[rule], rounding=rounding, zero_points="none"),
        "calibration": lambda: feeds[1:],
        "timing": False,
    }
    report = qcompiler.compile(model(text, weights), target, tmp_path / "b", strict=True, **facts)
    said = [d for d in report.decisions if d.op == "MatMul"]
    assert [d.action for d in said] == ["qdq", "qdq"]
    assert all("as they are stored: ORT's own MatMulNBits" in d.why for d in said)
    assert rounding == "nearest" or all(rounding in d.why for d in said)
    file = qcompiler.compile(
        model(text, weights), target, tmp_path / "m.onnx", emit="ort", **facts
    ).bundle
    found = [(node.attributes.get_int("bits"), node.attributes.get_int("block_size"))
             for node in ir.load(file).graph if node.op_type == "MatMulNBits"]  # fmt: skip
    assert found == [(8, block), (8, block if group else 64)]
    expected = run(model(text, weights), feeds[0])[0]
    session = qcompiler.load(report.bundle, native=False, providers=["CPUExecutionProvider"])
    assert sqnr(expected, session.run(None, feeds[0])[0]) > 36
    assert sqnr(expected, ort.InferenceSession(file).run(None, feeds[0])[0]) > 40


@pytest.mark.parametrize("target", ["arm-int4", "cuda-int4"])
@pytest.mark.parametrize(("word", "steps", "floor"), [("int3", 8, 10), ("int2", 4, 4)])
def test_fewer_bits(tmp_path, target, word, steps, floor):
    recipe = qcompiler.Recipe(nodes=[{"op": "MatMul", "precision": word}], group_size=32)
    report = qcompiler.compile(
        model(), target, tmp_path / "b", recipe=recipe, timing=False, stop_after="qdq"
    )
    graph = ir.load(report.bundle).graph
    stored = [node.inputs[0].const_value for node in graph if node.op_type == "DequantizeLinear"
              and node.inputs[0].const_value is not None]  # fmt: skip
    assert [tensor.dtype for tensor in stored] == [ir.DataType.INT4] * 2
    assert all(len(np.unique(tensor.numpy().astype(int))) == steps for tensor in stored)
    bits = word[-1]
    assert all(f"weights of {bits} bits, stored in int4" in d.why for d in report.decisions
               if d.op == "MatMul")  # fmt: skip
    bundle = qcompiler.compile(model(), target, tmp_path / "c", recipe=recipe, timing=False).bundle
    session = qcompiler.load(bundle, native=False, providers=["CPUExecutionProvider"])
    assert sqnr(run(model(), FEEDS)[0], session.run(None, FEEDS)[0]) > floor


def test_two_bits_are_two_in_a_file_for_onnx_runtime(tmp_path):
    recipe = qcompiler.Recipe(nodes=[{"op": "MatMul", "precision": "int2"}], group_size=32)
    facts = {"recipe": recipe, "timing": False}
    file = qcompiler.compile(model(), "cuda-int4", tmp_path / "m.onnx", emit="ort", **facts).bundle
    bits = [node.attributes.get_int("bits") for node in ir.load(file).graph
            if node.op_type == "MatMulNBits"]  # fmt: skip
    assert bits == [2, 2]
    bundle = qcompiler.compile(model(), "cuda-int4", tmp_path / "b", **facts).bundle
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    expected = qcompiler.load(
        bundle, native=False, providers=["CPUExecutionProvider"], session_options=options
    ).run(None, FEEDS)[0]
    assert sqnr(expected, ort.InferenceSession(file).run(None, FEEDS)[0]) > 60


@pytest.mark.parametrize("target", ["x86-int4", "cuda-int4", "arm-int4"])
def test_one_scale_per_channel(tmp_path, target):
    recipe = qcompiler.Recipe(group_size=0)
    weights = {"v": RNG.standard_normal((K, 200), dtype=np.float32) / 8,
               "w": RNG.standard_normal((200, N), dtype=np.float32) / 8}  # fmt: skip
    report = qcompiler.compile(
        model(weights=weights), target, tmp_path / "b", recipe=recipe, timing=False, strict=False
    )
    graph = ir.load(report.bundle / "model.onnx").graph
    shapes = [tuple(value.shape) for name, value in graph.initializers.items() if "scale" in name]
    assert sorted(shapes) == [(1, N), (1, 200)]
    session = qcompiler.load(report.bundle, native=False, providers=["CPUExecutionProvider"])
    assert sqnr(run(model(weights=weights), FEEDS)[0], session.run(None, FEEDS)[0]) > 12


@pytest.mark.parametrize("target", ["cuda-int4", "arm-int4"])
@pytest.mark.parametrize("depth", [40, 8, 200])
def test_groups_that_do_not_divide(tmp_path, target, depth):
    """The last group is shorter: exact, in the body and in ORT's own op."""
    text = f"g (float[n,{depth}] x) => (float[n,{N}] y) {{ y = MatMul (x, w) }}"
    weights = {"w": RNG.standard_normal((depth, N), dtype=np.float32)}
    feeds = {"x": RNG.standard_normal((5, depth), dtype=np.float32)}
    # What stays float is float16 for GPUs.
    floor = 38 if TARGETS[target].scheme.activation else 70
    report = qcompiler.compile(
        model(text, weights), target, tmp_path / "b", timing=False, stop_after="qdq"
    )
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    exact = ort.InferenceSession(report.bundle, options).run(None, feeds)[0]
    assert sqnr(run(model(text, weights), feeds)[0], exact) > 15
    bundle = qcompiler.compile(
        model(text, weights), target, tmp_path / "c", timing=False,
        recipe=qcompiler.Recipe(float="fp32"),
    ).bundle  # fmt: skip
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = qcompiler.load(
        bundle, native=False, providers=["CPUExecutionProvider"], session_options=options
    )
    assert sqnr(exact, session.run(None, feeds)[0]) > floor
