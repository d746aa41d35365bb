"""Move a Transpose behind the elementwise ops that read it, and undo it where another follows.

    Transpose, Gelu, Transpose   =>   Gelu
    Transpose, Sigmoid and Mul   =>   Sigmoid, Mul, Transpose

Part of `unfold_convolutions`.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.ir.graph import constant

__all__ = ["TOKENS_LAST", "sink_transpose"]

TOKENS_LAST = [0, 2, 1]
"""The order that swaps channels and tokens; its own inverse."""

_ELEMENTWISE = frozenset({
    "Add", "Clip", "Div", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish",
    "Mul", "Relu", "Sigmoid", "Softplus", "Sub", "Swish", "Tanh",
})  # fmt: skip


def sink_transpose(node: ir.Node) -> None:
    """Put a Transpose by `TOKENS_LAST` as far back as one alone can be; drop it where undone.

    Values that have their axes in another order then have other names.
    """
    moved = _elementwise_readers(node)
    ends = _ends(node, moved)
    if len(ends) == 1 and ends[0] is not node.outputs[0]:
        node = _move_behind(node, moved, ends[0])
    _cancel(node)


def _elementwise_readers(transpose: ir.Node) -> list[ir.Node]:
    """Ops that compute elementwise of its result, of each other and of single numbers."""
    value, graph = transpose.outputs[0], transpose.graph
    known, found, waiting = {value}, [], [value]
    while waiting:
        for node in dict.fromkeys(use.node for use in waiting.pop(0).uses()):
            fits = node.op_type in _ELEMENTWISE and not node.domain and node.graph is graph
            if (
                fits
                and node not in found
                and all(v is None or v in known or _is_number(v) for v in node.inputs)
            ):
                found.append(node)
                known.add(node.outputs[0])
                waiting.append(node.outputs[0])
    return found


def _is_number(value: ir.Value) -> bool:
    array = constant(value)
    return array is not None and array.size == 1 and array.ndim <= 3


def _ends(node: ir.Node, moved: list[ir.Node]) -> list[ir.Value]:
    """The values of these nodes that others read."""
    values = [node.outputs[0], *(inner.outputs[0] for inner in moved)]
    return [
        value
        for value in values
        if value.is_graph_output() or any(use.node not in moved for use in value.uses())
    ]


def _move_behind(node: ir.Node, moved: list[ir.Node], end: ir.Value) -> ir.Node:
    before, after, last = node.inputs[0], node.outputs[0], end.producer()
    assert before is not None and last is not None and last.graph is not None
    ir.convenience.replace_all_uses_with(after, before)
    shape, name = end.shape, end.name
    for inner in moved:
        value = inner.outputs[0]
        value.name, value.shape = f"{value.name}_by_tokens", None
    new = ir.node("Transpose", [end], {"perm": TOKENS_LAST}, name=node.name)
    result = new.outputs[0]
    ir.convenience.replace_all_uses_with(end, result, replace_graph_outputs=True)
    new.replace_input_with(0, end)
    result.name, result.shape, result.type = name, shape, end.type
    last.graph.insert_after(last, new)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    return new


def _cancel(node: ir.Node) -> None:
    """Take away the Transposes that undo this one, before and behind it, and it if unread."""
    before, after = node.inputs[0], node.outputs[0]
    assert before is not None
    for reader in [use.node for use in after.uses()]:
        if _swaps(reader) and not reader.outputs[0].is_graph_output():
            _pass_by(reader, before)
    earlier = before.producer()
    if earlier is not None and _swaps(earlier) and not after.is_graph_output():
        _pass_by(node, earlier.inputs[0])
        node = earlier
    if not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
        assert node.graph is not None
        node.graph.remove(node, safe=True)


def _swaps(node: ir.Node) -> bool:
    is_transpose = node.op_type == "Transpose" and not node.domain
    return is_transpose and list(node.attributes.get_ints("perm", [])) == TOKENS_LAST


def _pass_by(node: ir.Node, value: ir.Value | None) -> None:
    """Let readers of a node's result read `value`."""
    assert value is not None and node.graph is not None
    ir.convenience.replace_all_uses_with(node.outputs[0], value)
    node.graph.remove(node, safe=True)
