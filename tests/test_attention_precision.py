"""In which precision attention computes: what products around it, recipes and kept nodes say."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from conftest import DIGITS
from golden import sqnr
from instruction_sets import needs_kernels

import qcompiler
from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.pipeline import Pipeline
from qcompiler.recipe import Recipe
from qcompiler.targets.catalog import get_target


@needs_kernels
def test_the_compiled_example_runs_it_as_a_kernel(digits):
    kernels = {d.op for d in digits.decisions if d.action == "kernel"}
    assert "Attention_D16_ssss_int8" in kernels
    feeds = {"image": np.random.default_rng(0).random((3, 1, 20, 20), np.float32)}
    results = [
        qcompiler.load(digits.bundle, native=native).run(None, feeds) for native in (True, False)
    ]
    for got, want in zip(*results, strict=True):
        # Attention in int8 moves a few activations to the integer next to theirs.
        assert sqnr(want, got) >= 30


@pytest.mark.parametrize(
    ("recipe", "whole", "attention_alone"),
    [
        ({}, "_int8", ""),
        ({"attention": "int8"}, "_int8", "_int8"),
        ({"attention": "bfloat16"}, "_bf16", "_bf16"),
        ({"attention": "float32"}, "", ""),
    ],
)
def test_int8_is_used_after_int8_products_or_as_the_recipe_says(recipe, whole, attention_alone):
    chosen = Recipe.from_dict(recipe | {"keep_float": ["Conv"]})
    assert Recipe.from_dict(chosen.to_dict()) == chosen
    steps = list(Pipeline.default(get_target("x86-int8"), chosen))
    through = [step.name for step in steps].index("fuse-attention")
    model = ir.load(DIGITS / "digits.onnx")
    for step in steps[: through + 1]:
        model = step.apply(model).model
    assert sum(node.op_type == f"Attention_D16_ssss{whole}" for node in model.graph) == 2
    model = Canonicalize()(ir.load(DIGITS / "digits.onnx")).model
    steps[through].rewrite(model)
    assert sum(node.op_type == f"Attention_D16_ssss{attention_alone}" for node in model.graph) == 2


@pytest.mark.parametrize("kept", ["Softmax", "first", "last"])
def test_what_is_kept_float_is_not_rounded_inside_of_attention(kept):
    model = ir.load(DIGITS / "digits.onnx")
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    products = [node for node in model.graph if node.op_type == "MatMul"]
    names = {
        "Softmax": "Softmax",
        "first": products[[p.name for p in products].index(_scores_of(softmax))].name,
        "last": softmax.outputs[0].consumers()[0].name,
    }
    recipe = Recipe.from_dict({"keep_float": ["Conv", names[kept]]})
    for step in Pipeline.default(get_target("x86-int8"), recipe):
        model = step.apply(model).model
        if step.name == "fuse-attention":
            break
    found = [node.op_type for node in model.graph if "Attention" in node.op_type]
    rounded = {"Softmax": []}.get(kept, ["Attention_D16_ssss_int8"])
    assert sorted(found) == sorted(rounded + ["Attention_D16_ssss"] * (2 - len(rounded)))


def _scores_of(softmax: ir.Node) -> str | None:
    value = softmax.inputs[0]
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "MatMul":
            return node.name
        value = node.inputs[0]
    return None
