"""qcompile compare on nodes: its table, and a recipe that keeps the worst float."""

import json
import re

import numpy as np
import onnx_ir as ir
from golden import model_of
from spiked_models import data
from terminal import qcompile

import qcompiler
from qcompiler.node_errors import node_errors, worst_first
from qcompiler.samples import Samples

RNG = np.random.default_rng(0)


def test_table(spiked):
    source, bundle = spiked
    shown = qcompile("compare", source, bundle, "--data", source.parent / "x.npz")
    assert "keep float" in shown.stdout
    assert "Own" in shown.stdout
    none = qcompile("compare", source, bundle, "--data", source.parent / "x.npz", "--nodes", "0")
    assert "Own" not in none.stdout
    found = qcompile("compare", source, bundle, "--data", source.parent / "x.npz", "--json")
    content = json.loads(found.stdout)
    assert len(content["nodes"]) == 3
    assert content["worst"] == [error.node for error in worst_first(node_errors(
        source, bundle, Samples(source.parent / "x.npz")))]  # fmt: skip
    by_name = {entry["node"]: entry for entry in content["nodes"]}
    worst = content["worst"][0]
    assert by_name[worst]["remedy"].startswith(f"--keep-float {worst}")


def test_a_recipe_that_keeps_the_worst(spiked, tmp_path):
    source, bundle = spiked
    told = qcompile("compare", source, bundle, "--data", tmp_path / "x.npz", "--keep-worst", "1")
    (tmp_path / "recipe.toml").write_text(told.stdout)
    recipe = qcompiler.Recipe.read(tmp_path / "recipe.toml")
    assert recipe.keep_float == (worst_first(node_errors(source, bundle, Samples(data())))[0].node,)
    file = tmp_path / "recipe.toml"
    made = qcompile(source, "--target", "x86-int8", "--recipe", file, "-o", tmp_path / "c")
    assert made.exit_code == 0


IMAGES = [RNG.standard_normal((1, 4, 12, 12), np.float32) for _ in range(4)]
BETWEEN = """g (float[1,4,12,12] x) => (float[1,8,8,8] y) {
    a = Conv (x, k) b = Conv <pads = [1,1,1,1]> (a, l) c = Mul (a, b) d = Conv (c, l) y = Neg (d)
}"""


def test_what_lies_between_layers_can_stay_float_too(tmp_path):
    kernels = {
        "k": RNG.standard_normal((8, 4, 3, 3), dtype=np.float32),
        "l": RNG.standard_normal((8, 8, 3, 3), dtype=np.float32),
    }
    model = model_of(BETWEEN, kernels)
    for node, letter in zip(model.graph, "abcde", strict=True):
        node.name = f"node_{letter}"
    ir.save(model, tmp_path / "m.onnx")
    for index, image in enumerate(IMAGES):
        np.savez(tmp_path / f"{index}.npz", x=image)
    asked = ("compare", tmp_path / "m.onnx", tmp_path / "b", "--data", tmp_path / "0.npz")
    compiled = ("--target", "arm-int8", "--calib", tmp_path, "-o", tmp_path / "b")
    assert qcompile(tmp_path / "m.onnx", *compiled).exit_code == 0
    found = json.loads(qcompile(*asked, "--json").stdout)
    remedies = {entry["node"]: entry["remedy"] for entry in found["nodes"]}
    assert remedies["node_c"] == "--keep-float node_c"
    told = qcompile(*asked, "--keep-worst", "50")
    assert re.search(r"only \d of its nodes err and could be kept float", told.stderr)
    (tmp_path / "r.toml").write_text(told.stdout)
    recipe = qcompiler.Recipe.read(tmp_path / "r.toml")
    assert {"node_a", "node_b", "node_c", "node_d"} <= set(recipe.keep_float)
    again = qcompile(tmp_path / "m.onnx", *compiled, "--recipe", tmp_path / "r.toml", "--json")
    reasons = {d["node"]: d["why"] for d in json.loads(again.stdout)["decisions"]}
    assert reasons["node_c"] == "kept float by request (node_c)"


def test_keeping_the_worst_of_no_bundle(spiked, tmp_path):
    source, _ = spiked
    arguments = ("compare", source, source, "--data", tmp_path / "x.npz", "--keep-worst")
    failed = qcompile(*arguments, "1")
    assert failed.exit_code == 1
    assert "is not a bundle" in failed.stderr
    assert "0 is not in the range x>=1" in qcompile(*arguments, "0").stderr
