"""Bring Q next to the op whose result it stores, past ops that only move data.

    Q(Move(Op(DQ(x))), s, z)   =>   Move(Q(Op(DQ(x)), s, z))

Part of `normalize_qdq`.  Exact, as `move_pairs` is.  Where nothing before it has a quantized form,
it stays: what is left out on the way would be quantized for nothing.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values

from qcompiler.ir.graph import constant, dequantize_of, only_consumer
from qcompiler.passes.move_pairs import MOVES, data_of, no_integer_form, on_integers
from qcompiler.passes.qdq_parameters import is_pair, is_per_tensor, same_parameters, zero_of

__all__ = ["pull_quantize"]

_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_PRODUCERS = _PRODUCTS | {"Add", "AveragePool", "GlobalAveragePool", "Mul"}
"""Ops with a quantized form, of which a Q right after them becomes a part."""


def pull_quantize(quantize: ir.Node) -> list[ir.Node]:
    """Q(Move(x)) => Move(Q(x)); the Qs before the move, none if it stays as it is."""
    value = quantize.inputs[0]
    move = value.producer() if value is not None else None
    if move is None or quantize.graph is None or quantize.graph is not move.graph:
        return []
    if move.domain != "" or move.op_type not in MOVES or not is_per_tensor(quantize):
        return []
    readers = _readers(move)
    if readers is None or any(not same_parameters(quantize, reader) for reader in readers):
        return []
    scale = quantize.inputs[1]
    if constant(scale) is None or no_integer_form(move, quantize.outputs[0], scale):
        return []
    if not all(_is_quantizable(value, move) for value in data_of(move)):
        return []
    inner = [_like(quantize, value) for value in data_of(move)]
    moved = on_integers(move, [new.outputs[0] for new in inner], zero_of(quantize))
    of = dict(zip(move.outputs, moved.outputs, strict=False))
    replace_nodes_and_values(
        move.graph,
        move,
        [*readers, move],
        [*inner, moved],
        [reader.outputs[0] for reader in readers],
        [of[value] for reader in readers if (value := reader.inputs[0]) is not None],
    )
    return inner


def _like(quantize: ir.Node, value: ir.Value | None) -> ir.Node:
    """A Q of `value` with the parameters of `quantize`."""
    new = ir.node("QuantizeLinear", [value, *quantize.inputs[1:]], quantize.attributes)
    new.name = quantize.name
    new.metadata_props.update(quantize.metadata_props)
    new.outputs[0].type = quantize.outputs[0].type
    new.outputs[0].shape = None if value is None else value.shape
    return new


def _readers(move: ir.Node) -> list[ir.Node] | None:
    """The Qs that read the results of `move`, each one of its own; None if anything else does."""
    readers: list[ir.Node] = []
    for value in move.outputs:
        reader = only_consumer(value)
        if reader is not None and is_pair(reader, "QuantizeLinear") and reader.inputs[0] is value:
            readers.append(reader)
        elif value.uses() or value.is_graph_output():
            return None
    return readers


def _is_quantizable(value: ir.Value | None, move: ir.Node) -> bool:
    """Whether only `move` reads `value`, and an op with a quantized form makes it."""
    if value is None or only_consumer(value) is not move:
        return False
    if constant(value) is not None:
        return True
    maker = value.producer()
    while maker is not None and (maker.op_type in MOVES or maker.op_type in ("Clip", "Relu")):
        value = maker.inputs[0]
        maker = value.producer() if value is not None else None
    if maker is None or maker.op_type not in _PRODUCERS:
        return False
    operands = [maker.inputs[0]] if maker.op_type in _PRODUCTS else list(maker.inputs)
    products = [v.producer() for v in operands if v is not None and maker.op_type == "Add"]
    operands += [p.inputs[0] for p in products if p is not None and p.op_type in _PRODUCTS]
    return any(dequantize_of(operand) is not None for operand in operands)
