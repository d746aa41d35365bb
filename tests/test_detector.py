"""A detector that picks its boxes itself: how many there are depends on values, and so differs."""

import json

import numpy as np
import onnx_ir as ir
import pytest
from golden import model_of
from terminal import qcompile

import qcompiler
from qcompiler.compare import compare
from qcompiler.ir.errors import BundleError
from qcompiler.numerics import CheckNumerics
from qcompiler.samples import Samples

RNG = np.random.default_rng(0)
TEXT = """g (float[1,4,16,16] x) => (float[m,4] boxes, int64[m,3] picked) {
    c = Conv (x, a) r = Relu (c) d = Conv (r, b) s = Relu (d)
    corners = Conv (s, box) moved = Transpose <perm = [0,2,3,1]> (corners)
    all = Reshape (moved, rows) score = Conv (s, class) sure = Sigmoid (score)
    scores = Reshape (sure, columns) picked = NonMaxSuppression (all, scores, most, overlap, least)
    at = Gather <axis = 1> (picked, two) first = Squeeze (all, zero) boxes = Gather (first, at)
}"""
WEIGHTS = {
    "a": RNG.standard_normal((8, 4, 3, 3), dtype=np.float32),
    "b": RNG.standard_normal((8, 8, 3, 3), dtype=np.float32) / 5,
    "box": RNG.standard_normal((4, 8, 1, 1), dtype=np.float32),
    "class": RNG.standard_normal((2, 8, 1, 1), dtype=np.float32),
    "rows": np.array([1, -1, 4]),
    "columns": np.array([1, 2, -1]),
    "most": np.array(20),
    "overlap": np.float32(0.5),
    "least": np.float32(0.1),
    "two": np.array(2),
    "zero": np.array([0]),
}
IMAGES = [{"x": RNG.standard_normal((1, 4, 16, 16), dtype=np.float32)} for _ in range(6)]


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """The model's file and its bundle, checked after every pass."""
    folder = tmp_path_factory.mktemp("detector")
    model, bundle = folder / "model.onnx", folder / "bundle"
    ir.save(model_of(TEXT, WEIGHTS), model)
    numerics = CheckNumerics(Samples(IMAGES))
    recipe = qcompiler.Recipe(passes={"assign-precision": {"outputs": True}})  # so that it errs
    qcompiler.compile(
        model, "arm-int8", bundle, recipe=recipe, calibration=IMAGES, watchers=[numerics]
    )
    assert any(out.resized for change in numerics.changes for out in change.outputs)
    return model, bundle


def test_it_is_quantized(detector):
    nodes = ir.load(detector[1] / "model.onnx").graph.all_nodes()
    assert sum(node.op_type.startswith("QConv") for node in nodes) == 4


def test_boxes_and_scores_are_not_rounded(tmp_path):
    report = qcompiler.compile(
        model_of(TEXT, WEIGHTS), "arm-int8", tmp_path / "bundle", calibration=IMAGES
    )
    heads = {d.why for d in report.decisions if d.op == "Conv" and d.action == "float"}
    through = "its result leaves the graph, or decides what does, through "
    assert heads == {through + "Transpose", through + "Sigmoid"}
    assert sum(d.op.startswith("QConv") for d in report.decisions) == 2


def test_samples_with_other_sizes_are_counted_and_left_out(detector):
    found = compare(*detector, Samples(IMAGES), nodes=True)
    for output in found.outputs:
        assert 0 < output.resized < len(IMAGES) and output.values and output.sqnr is not None
    assert found.nodes and all(error.own.sqnr > 30 for error in found.nodes if error.own.sqnr)


def test_the_terminal_says_so(detector, tmp_path):
    np.savez(tmp_path / "0.npz", **IMAGES[0])
    (tmp_path / "all").mkdir()
    for index, image in enumerate(IMAGES):
        np.savez(tmp_path / "all" / f"{index}.npz", **image)
    done = qcompile("compare", *detector, "--data", tmp_path / "all")
    assert "output 'boxes' has another size on " in " ".join(done.stderr.split())
    found = json.loads(qcompile("compare", *detector, "--data", tmp_path / "all", "--json").stdout)
    assert found["outputs"][0]["resized"] > 0


def test_nothing_of_the_same_size(tmp_path):
    """It says neither that they are equal nor how near they are."""
    for name, least in (("few", 1.0), ("many", -1.0)):
        text = "g (float[n] x) => (float[m] y) { b = Greater (x, least) y = Compress (x, b) }"
        ir.save(model_of(text, {"least": np.float32(least)}), tmp_path / name)
    x = np.linspace(-2, 2, 9, dtype=np.float32)
    (output,) = compare(tmp_path / "few", tmp_path / "many", Samples([x, x])).outputs
    assert (output.resized, output.values, output.sqnr) == (2, 0, -300)


def test_a_size_that_both_know_must_be_the_same(tmp_path):
    for size in (3, 4):
        text = f"g (float[n,12] x) => (float[m,{size}] y) {{ y = Reshape (x, to) }}"
        ir.save(model_of(text, {"to": np.array([-1, size])}), tmp_path / str(size))
    with pytest.raises(BundleError, match=r"output 'y' has shape \[3, 4\] in .*, \[4, 3\] in"):
        compare(tmp_path / "3", tmp_path / "4", Samples([np.ones((1, 12), np.float32)]))
