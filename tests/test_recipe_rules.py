"""Rules of a recipe: which nodes follow them, which cannot, and what is said of that."""

import numpy as np
import onnx_ir as ir
import pytest
from golden import model_of

import qcompiler
from qcompiler.ir.decisions import decision_of, plan_of
from qcompiler.ir.errors import OptionError
from qcompiler.ir.types import PerAxis, PerGroup
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.node_names import names_of
from qcompiler.recipe import Recipe
from qcompiler.targets.catalog import TARGETS

RNG = np.random.default_rng(0)
TWO = (
    "g (float[m,64] x) => (float[m,64] y) { a = MatMul (x, v) b = Relu (a) c = MatMul (b, w) "
    "y = Softmax (c) }"
)
WEIGHTS = {name: RNG.standard_normal((64, 64), dtype=np.float32) for name in ("v", "w")}
CONV = (
    "g (float[1,16,8,8] x) => (float[1,16,8,8] z, float[1,16,8,32] p) "
    "{ a = Conv (x, k) b = Relu (a) c = Conv (b, k) z = Softmax (c) p = MatMul (x, t) }"
)
KERNELS = {
    "k": RNG.standard_normal((16, 16, 1, 1), dtype=np.float32),
    "t": RNG.standard_normal((8, 32), dtype=np.float32),
}
NAMES = ("up", "act", "down", "soft")


def assigned(rules, target="x86-int8", model=None, keep=(), names=NAMES, **options):
    """The nodes of a model and the pass that planned them."""
    model = model or model_of(TWO, WEIGHTS)
    for node, name in zip(model.graph, names, strict=False):
        node.name = name
    recipe = Recipe(keep_float=keep, nodes=rules)
    chosen = AssignPrecision.Options(recipe.keep_float, **options)
    rewrite = AssignPrecision(TARGETS[target].scheme, chosen, recipe.nodes)
    rewrite(model)
    return {node.name: node for node in model.graph}, rewrite


def stored(nodes):
    """How the weights of the planned nodes are stored, None where they are float."""
    plans = {name: plan_of(nodes[name]) for name in ("up", "down")}
    return [plan and plan.weight.storage.name.lower() for plan in plans.values()]


@pytest.mark.parametrize(
    ("rules", "want"),
    [
        ([], ["int4", "int4"]),
        ([{"precision": "int8"}], ["int8", "int8"]),
        ([{"match": "up", "precision": "int8"}], ["int8", "int4"]),
        ([{"match": "d*", "precision": "float"}], ["int4", None]),
        ([{"match": "re:(up|down)", "precision": "int8"}], ["int8", "int8"]),
        ([{"match": "re:u|ow", "precision": "float"}, {"precision": "int8"}], "no name"),
        ([{"op": "MatMul", "precision": "int8"}], ["int8", "int8"]),
        ([{"op": "Mat*", "match": "up", "precision": "int8"}], ["int8", "int4"]),
        ([{"match": "up + down", "precision": "int8"}], ["int8", "int8"]),
        (
            [{"op": "MatMul", "precision": "int8"}, {"match": "down", "precision": "int4"}],
            ["int8", "int4"],
        ),
        (
            [{"match": "down", "precision": "float"}, {"op": "MatMul", "precision": "int8"}],
            ["int8", "int8"],
        ),
    ],
)
def test_later_rules_win(rules, want):
    if want == "no name":
        with pytest.raises(OptionError, match="no name of the model fits 're:u|ow'"):
            assigned(rules, "x86-int4")
        return
    assert stored(assigned(rules, "x86-int4")[0]) == want


def test_rules_join_key_by_key():
    rules = [
        {"op": "MatMul", "precision": "int4", "group_size": 64},
        {"match": "down", "group_size": 16},
        {"match": "up", "rounding": "nearest"},
    ]
    nodes, rewrite = assigned(rules)
    up, down = (plan_of(nodes[name]) for name in ("up", "down"))
    assert (up.weight.granularity, down.weight.granularity) == (PerGroup(0, 64), PerGroup(0, 16))
    assert up.activation == down.activation == plan_of(assigned([])[0]["up"]).activation
    assert up.requested and down.requested and not plan_of(assigned([])[0]["up"]).requested
    assert not rewrite.notes


def test_the_forms_of_a_product():
    nodes, _ = assigned([{"match": "up", "precision": "int4", "activation": "float"}])
    assert plan_of(nodes["up"]).activation is None
    assert plan_of(nodes["up"]).weight.granularity == PerGroup(0, 32)
    rules = [{"match": "up", "precision": "int8", "activation": "dynamic"}]
    nodes, _ = assigned(rules, "cuda-int4")
    assert plan_of(nodes["up"]).weight.granularity == PerAxis(1)
    assert plan_of(nodes["up"]).activation.type.granularity == PerGroup(-1, 64)
    nodes, _ = assigned([{"match": "up", "precision": "int8"}], "cuda-fp8")
    assert plan_of(nodes["up"]).activation.type.storage is ir.DataType.INT8
    assert plan_of(nodes["down"]).activation.type.storage is ir.DataType.FLOAT8E4M3FN


@pytest.mark.parametrize(
    ("scopes", "module"),
    [
        ("['', 'm', 'm.layer.0.query', 'linear']", "m.layer.0.query"),
        ("['', 'linear']", ""),
        ("[]", ""),
        ("no list", ""),
        ("{1: 2}", ""),
        ("['', 3, 'linear']", ""),
    ],
)
def test_nodes_of_torch_go_by_their_modules(scopes, module):
    def made():
        model = model_of(TWO, WEIGHTS)
        model.graph[0].metadata_props["pkg.torch.onnx.name_scopes"] = scopes
        return model

    assert names_of(made().graph[0])[1:] == ([module] if module else [])
    if module:
        rules = [{"match": "*.query", "precision": "int4"}]
        assert stored(assigned(rules, model=made())[0]) == ["int4", "int8"]
        nodes = assigned([], model=made(), keep=("m.layer.?.query",))[0]
        assert decision_of(nodes["up"]).why == "kept float by request (m.layer.?.query)"
        with pytest.raises(OptionError, match=r"did you mean 'm.layer.0.query'"):
            assigned([], model=made(), keep=("m.layer.0.queri",))


def test_what_keeps_float_has_the_last_word():
    nodes, rewrite = assigned([{"match": "up", "precision": "int4"}], keep=("up",))
    assert stored(nodes) == [None, "int8"]
    assert rewrite.notes == (
        "recipe: rule 1 (match 'up') has no effect: what comes later overrules it",
    )


def test_a_rule_that_later_ones_overrule_is_told_of():
    rules = [{"match": "up", "precision": "float"}, {"op": "MatMul", "precision": "int4"}]
    assert "rule 1 (match 'up') has no effect" in assigned(rules)[1].notes[0]
    assert not assigned(rules[::-1])[1].notes


@pytest.mark.parametrize(
    ("rule", "target", "message"),
    [
        ({"match": "dwn", "precision": "int4"}, "x86-int8", "fits 'dwn'; did you mean 'down'"),
        ({"op": "Matmul", "precision": "int4"}, "x86-int8", "no op 'Matmul'; did you mean 'MatMul"),
        ({"op": "Relu", "match": "up", "precision": "float"}, "x86-int8", "none has such a name"),
        ({"op": "Softmax", "precision": "int8"}, "x86-int8", "'soft': Softmax is sensitive"),
        ({"match": "act", "group_size": 32}, "x86-int4", "'act': holds no weights to quantize"),
        (
            {"precision": "fp8"},
            "x86-int8",
            r"rule 1 \(of all nodes\): precision 'fp8' is possible for none of its 4 nodes: 'up': "
            "int8 targets do not multiply fp8",
        ),
        (
            {"precision": "fp8", "activation": "float"},
            "cuda-fp8",
            "fp8 targets multiply no fp8 weights by float activations$",
        ),
        (
            {"group_size": 32},
            "x86-int8",
            'int4 ones have groups, and int8 ones beside activation = "float"$',
        ),
        (
            {"precision": "int8", "activation": "float", "zero_points": "float"},
            "x86-int8",
            "only groups of int4 weights may have float zero points",
        ),
        (
            {"precision": "int8", "activation": "float", "scales": "int8"},
            "x86-int4",
            "only scales of int4 groups without integer zero points are stored in 8 bits",
        ),
        ({"calibration": "mse"}, "x86-int8", "activations are dynamic, nothing of them is calibr"),
        (
            {"precision": "int8", "zero_points": "integer"},
            "x86-int4",
            "only groups of weights may have zero points",
        ),
        ({"rounding": "gptq"}, "cuda-fp8", "only integers are rounded otherwise than to nearest"),
    ],
)
def test_a_rule_that_no_node_follows_is_refused(rule, target, message):
    with pytest.raises(OptionError, match=message):
        assigned([rule], target)


def test_a_node_that_cannot_follow_says_so_where_others_can():
    rules = [{"activation": "dynamic"}]
    names = ("one", "act", "two", "soft", "product")
    nodes, rewrite = assigned(rules, model=model_of(CONV, KERNELS), names=names)
    assert plan_of(nodes["product"]).activation.scale == "dynamic"
    assert plan_of(nodes["one"]).activation.scale == "static"
    reason = "activation 'dynamic' of the recipe is not possible: convolutions have static"
    assert reason in decision_of(nodes["one"]).why
    assert not rewrite.notes


def test_a_rule_may_ask_for_static_activations_of_products():
    rules = [{"op": "MatMul", "activation": "static", "calibration": "min-max"}]
    nodes, _ = assigned(rules)
    plan = plan_of(nodes["up"])
    assert str(plan.activation) == "static quant<uint8:float, tensor, asymmetric>"
    assert plan.calibration == "min-max"
    assert plan.output is None


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"precision": "int4"}, "'one': convolutions are int8 or float"),
        ({"activation": "dynamic"}, "'one': convolutions have static activations"),
        ({"group_size": 32}, "'one': these weights have a scale per channel"),
        ({"zero_points": "float"}, "'one': only groups of int4 weights may have float zero points"),
    ],
)
def test_what_convolutions_cannot_be(rule, message):
    with pytest.raises(OptionError, match=message):
        assigned([{"op": "Conv", **rule}], model=model_of(CONV, KERNELS), names=("one",))


def test_rules_about_a_model_that_is_quantized():
    text = (
        "g (float[m,64] x) => (float[m,64] y) { q = QuantizeLinear (x, s, z) "
        "d = DequantizeLinear (q, s, z) y = MatMul (d, v) }"
    )
    model = model_of(text, WEIGHTS | {"s": np.float32(0.1), "z": np.uint8(128)})
    with pytest.raises(OptionError, match=r"rule 1 \(op 'MatMul'\): the source is quantized alrea"):
        assigned([{"op": "MatMul", "precision": "int4"}], model=model, names=())


def test_calibration_of_single_nodes(tmp_path):
    """The scales of what one convolution reads and stores follow its rule, and no others do."""
    scales = {}
    for method in (None, "min-max"):
        model = model_of(CONV.replace("x, k", "x, j"), KERNELS | {"j": KERNELS["k"] / 8})
        for node, name in zip(model.graph, ("one", "act", "two", "soft", "product"), strict=True):
            node.name = name
        rules = ({"match": "one", "calibration": method},) if method else ()
        made = qcompiler.compile(
            model, "arm-int8", tmp_path / f"{method}.onnx", stop_after="qdq",
            calibration=lambda: [np.random.default_rng(1).standard_normal((1, 16, 8, 8), "f")],
            recipe=Recipe(
                calibration="percentile=90",
                nodes=rules,
                passes={
                    "keep-sensitive": {"runs": 0, "own": 0.1},
                    "equalize-layers": {"gain": 1e3},
                    "assign-precision": {"outputs": True},
                },
            ),
        )  # fmt: skip
        graph = ir.load(made.bundle).graph
        scales[method] = {
            node.inputs[0].name: float(node.inputs[1].const_value.numpy())
            for node in graph
            if node.op_type == "QuantizeLinear" and node.inputs[1].const_value is not None
        }
    wider = {name: scales["min-max"][name] / scale for name, scale in scales[None].items()}
    assert len(wider) == 3
    assert sorted(ratio > 1.2 for ratio in wider.values()) == [False, True, True]
