"""Take apart what ONNX Runtime's own optimizers fused: its ops are closed to every other pass.

    SkipLayerNormalization(x, s, g, b, c)    =>   LayerNormalization(x + s + c, g, b)
    SkipSimplifiedLayerNormalization, SimplifiedLayerNormalization   =>   an RMS norm in its pieces
    BiasGelu(x, b), FastGelu(x, b), Gelu(x)  =>   Gelu(x + b), as a tanh, Gelu(x)
    QuickGelu(x)                             =>   x * Sigmoid(alpha * x)
    FusedMatMul(x, w)                        =>   alpha * MatMul(x', w')
    FusedConv(x, w, b, z)                    =>   Relu(Conv(x, w, b) + z), or another activation
    EmbedLayerNormalization(ids, …)          =>   LayerNormalization(Gather + Gather + Gather)
    Attention(x, w, b, mask)                 =>   as `lift_attention` does with QAttention

Types and shapes behind such ops are unknown to ONNX, too, and so nothing was quantized there.  Part
of `canonicalize`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import every_node, replace_nodes
from qcompiler.passes.lift_attention import heads_apart
from qcompiler.passes.lifting import Form, NotLiftedError

__all__ = ["ExpandFusions"]

_ACTIVATIONS = {
    "Relu": (), "Tanh": (), "Sigmoid": (), "LeakyRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
}  # fmt: skip
"""What a FusedConv ends in, and its attributes, in the order of `activation_params`."""


class ExpandFusions(ir.passes.InPlacePass):
    """Put standard ops in the place of each fused one that has them; others stay."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Take apart; shapes are to be inferred afterwards."""
        nodes = list(every_node(model.graph))
        expanded = [_try_expand(model.graph, node) for node in nodes]
        return ir.passes.PassResult(model, any(expanded))


def _try_expand(graph: ir.Graph, node: ir.Node) -> bool:
    expand = _EXPANSIONS.get((node.domain, node.op_type))
    if expand is None:
        return False
    form = Form(graph, node)
    try:
        form.needs_opset(20, "Gelu")
        expand(form)
    except NotLiftedError:
        form.discard()
        return False
    replace_nodes(form.covered, form.nodes)
    return True


def _sum(form: Form, parts: Sequence[ir.Value | None]) -> ir.Value:
    given = [part for part in parts if part is not None]
    total = given[0]
    for part in given[1:]:
        total = form.op("Add", [total, part])
    return total


def _hand_on_sum(form: Form, position: int, total: ir.Value) -> None:
    """The sum that was normalized is read by the next block; mean and deviation by nobody."""
    results = form.node.outputs
    if any(value.uses() or value.is_graph_output() for value in results[1:position]):
        raise NotLiftedError("its mean or deviation is read")
    for result in results[position:]:
        if result.is_graph_output():
            raise NotLiftedError("its sum is a result of the model")
        result.replace_all_uses_with(total)
    form.node.resize_outputs(1)


def _layer_norm(form: Form, x: ir.Value, gamma: ir.Value | None, beta: ir.Value | None) -> None:
    epsilon = form.node.attributes.get_float("epsilon", 1e-12)
    operands = [x, gamma] if beta is None else [x, gamma, beta]
    form.op("LayerNormalization", operands, {"axis": -1, "epsilon": epsilon})


def _rms_norm(form: Form, x: ir.Value, gamma: ir.Value | None, default: float) -> None:
    given = form.inputs(1)[0]  # x may be a sum of it and others of its type
    if gamma is None or gamma.dtype is None or given is None or given.dtype is None:
        raise NotLiftedError("the types of its operands are unknown")
    wide = x
    if given.dtype is not ir.DataType.FLOAT:
        wide = form.op("Cast", [x], {"to": int(ir.DataType.FLOAT)})
    axis = form.constant("axis", np.asarray([-1], np.int64))
    epsilon = form.node.attributes.get_float("epsilon", default)
    square = form.op("ReduceMean", [form.op("Mul", [wide, wide]), axis], {"keepdims": 1})
    bounded = form.op("Add", [square, form.constant("epsilon", np.asarray(epsilon, np.float32))])
    unit = form.op("Div", [wide, form.op("Sqrt", [bounded])])
    if gamma.dtype is not ir.DataType.FLOAT:
        unit = form.op("Cast", [unit], {"to": int(gamma.dtype)})
    form.op("Mul", [unit, gamma])


def _skip_layer_norm(form: Form) -> None:
    x, skip, gamma, beta, bias = form.inputs(5)
    total = _sum(form, [x, skip, bias])
    _layer_norm(form, total, gamma, beta)
    _hand_on_sum(form, 3, total)


def _skip_rms_norm(form: Form) -> None:
    x, skip, gamma, bias = form.inputs(4)
    total = _sum(form, [x, skip, bias])
    _rms_norm(form, total, gamma, 1e-12)
    _hand_on_sum(form, 3, total)


def _simplified_layer_norm(form: Form) -> None:
    x, gamma = form.inputs(2)
    last = len(x.shape) - 1 if x is not None and x.shape is not None else None
    if x is None or form.node.attributes.get_int("axis", -1) not in (-1, last):
        raise NotLiftedError("it normalizes more than the last axis")
    if any(value.uses() or value.is_graph_output() for value in form.node.outputs[1:]):
        raise NotLiftedError("its deviation is read")
    _rms_norm(form, x, gamma, 1e-5)
    form.node.resize_outputs(1)


def _embedding(form: Form) -> None:
    ids, segments, words, positions, kinds, gamma, beta, mask, places = form.inputs(9)
    zero, one = (form.constant(f"number_{i}", np.asarray(i, np.int64)) for i in range(2))
    if places is None:
        length = form.op("Shape", [ids], {"start": 1, "end": 2})
        places = form.op("Range", [zero, form.op("Squeeze", [length]), one])
    looked_up = [form.op("Gather", [words, ids]), form.op("Gather", [positions, places])]
    if segments is not None:
        looked_up.append(form.op("Gather", [kinds, segments]))
    total = _sum(form, looked_up)
    results = form.node.outputs
    lengths = results[1] if len(results) > 1 else None
    if any(value.is_graph_output() for value in results[2:]):
        raise NotLiftedError("its sum is a result of the model")
    if lengths is not None and (lengths.uses() or lengths.is_graph_output()):
        if mask is None or lengths.is_graph_output():
            raise NotLiftedError("the lengths it counts are of no mask, or a result of the model")
        number = {"to": int(ir.DataType.INT32)}
        ones = form.op("Equal", [form.op("Cast", [mask], number), form.op("Cast", [one], number)])
        axes = form.constant("keys", np.asarray([1], np.int64))
        counted = form.op("ReduceSum", [form.op("Cast", [ones], number), axes], {"keepdims": 0})
        lengths.replace_all_uses_with(counted)
    _layer_norm(form, total, gamma, beta)
    _hand_on_sum(form, 2, total)


def _gelu(form: Form) -> None:
    fast = form.node.op_type == "FastGelu"
    form.op("Gelu", [_sum(form, form.inputs(2))], {"approximate": "tanh"} if fast else {})


def _quick_gelu(form: Form) -> None:
    (x,), alpha = form.inputs(1), form.node.attributes.get_float("alpha", 1.702)
    scaled = x if alpha == 1.0 else form.op("Mul", [x, _factor(form, x, alpha)])
    form.op("Mul", [x, form.op("Sigmoid", [scaled])])


def _factor(form: Form, like: ir.Value | None, number: float) -> ir.Value:
    if like is None or like.dtype is None:
        raise NotLiftedError("the type of its operand is unknown")
    return form.constant("factor", np.asarray(number, like.dtype.numpy()))


def _fused_matmul(form: Form) -> None:
    attributes, operands = form.node.attributes, []
    if attributes.get_int("transBatchA", 0) or attributes.get_int("transBatchB", 0):
        raise NotLiftedError("it moves the axis of batches")
    for value, turn in zip(form.inputs(2), ("transA", "transB"), strict=True):
        if attributes.get_int(turn, 0):
            if value is None or value.shape is None or len(value.shape) < 2:
                raise NotLiftedError("the rank of its operand is unknown")
            order = [*range(len(value.shape))]
            order[-2:] = reversed(order[-2:])
            value = form.op("Transpose", [value], {"perm": order})
        operands.append(value)
    alpha = attributes.get_float("alpha", 1.0)
    factor = None if alpha == 1.0 else _factor(form, form.inputs(1)[0], alpha)
    product = form.op("MatMul", operands)
    first, matmul = form.nodes[0], form.nodes[-1]
    # What a user says about the node is about its product.
    first.name, matmul.name = matmul.name, first.name
    if factor is not None:
        form.op("Mul", [product, factor])


def _fused_conv(form: Form) -> None:
    x, w, bias, added = form.inputs(4)
    attributes = form.attributes("activation", "activation_params")
    result = form.op("Conv", [x, w] if bias is None else [x, w, bias], attributes)
    if added is not None:
        result = form.op("Add", [result, added])
    activation = form.node.attributes.get_string("activation", "")
    if activation and activation not in _ACTIVATIONS:
        raise NotLiftedError(f"it ends in {activation}")
    if activation:
        numbers = form.node.attributes.get_floats("activation_params", ())
        form.op(activation, [result], dict(zip(_ACTIVATIONS[activation], numbers, strict=False)))


def _attention(form: Form) -> None:
    x, w, bias, mask, past, added, _ = form.inputs(7)
    if past is not None or added is not None or "qkv_hidden_sizes" in form.node.attributes:
        raise NotLiftedError("it has a cache, a bias of scores, or heads of several sizes")
    counted = mask.producer() if mask is not None else None
    if counted is not None and counted.op_type == "ReduceSum":
        if mask is None or mask.shape is None or len(mask.shape) != 1:
            raise NotLiftedError("its mask may be other than the lengths of sequences")
        mask = _keys_below(form, x, mask)
    product = form.op("MatMul", [x, w])
    heads_apart(form, form.op("Add", [product, bias]) if bias is not None else product, w, mask)


def _keys_below(form: Form, x: ir.Value | None, lengths: ir.Value | None) -> ir.Value:
    """1 for each key of a sequence before its length, [batch, keys]; `_embedding` counted it."""
    zero, one = (form.constant(f"number_{i}", np.asarray(i, np.int64)) for i in range(2))
    keys = form.op("Squeeze", [form.op("Shape", [x], {"start": 1, "end": 2})])
    places = form.op("Range", [zero, keys, one])
    axis = form.constant("key_axis", np.asarray([1], np.int64))
    ends = form.op("Cast", [form.op("Unsqueeze", [lengths, axis])], {"to": int(ir.DataType.INT64)})
    below = form.op("Less", [places, ends])
    below.shape = ir.Shape([None, None])
    return below


_EXPANSIONS = {
    ("com.microsoft", "SkipLayerNormalization"): _skip_layer_norm,
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): _skip_rms_norm,
    ("", "SimplifiedLayerNormalization"): _simplified_layer_norm,
    ("com.microsoft", "EmbedLayerNormalization"): _embedding,
    ("com.microsoft", "BiasGelu"): _gelu,
    ("com.microsoft", "FastGelu"): _gelu,
    ("com.microsoft", "Gelu"): _gelu,
    ("com.microsoft", "QuickGelu"): _quick_gelu,
    ("com.microsoft", "FusedMatMul"): _fused_matmul,
    ("com.microsoft", "FusedConv"): _fused_conv,
    ("com.microsoft", "Attention"): _attention,
}
