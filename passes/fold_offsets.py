"""Multiply the offsets of a weight's groups by the sums of what they are multiplied by.

    y = MatMul(x, DQ(w, ws) + Gather(wo, groups))
        =>   y = QMatMulW4A16(x, w, ws) + MatMul(GroupSumsA16(x), wo)
    y = MatMul(DQ(q, s), …)
        =>   y = QMatMulW4A8(q, s, w, ws) + MatMul(GroupSumsA8(q, s), wo)

All products of one value share its sums, and the product of the weights is one that kernels know,
which may add the rest in its epilogue.  Offsets of two levels become Cast(go) * co, which ORT folds
when a session is made.  Part of `fold_qdq`.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qcompiler.ir import dialect
from qcompiler.ir.decisions import Preference, decide
from qcompiler.ir.graph import constant

__all__ = ["add_offsets", "insert_group_sums"]


def insert_group_sums(data: Sequence[ir.Value | None], block: int, before: ir.Node) -> ir.Value:
    """The sums of groups of activations, [..., K/G], computed before a node.

    Args:
        data: Floats, or stored values and the scales of tokens.
        block: Values of a group, G.
        before: The first product that needs them.
    """
    op, first = f"GroupSumsA{'8' if len(data) == 2 else '16'}", data[0]
    assert first is not None and before.graph is not None
    node = ir.node(
        op, data, {"block_size": block}, domain=dialect.DOMAIN, version=dialect.VERSION,
        name=f"{first.name}_sums_of_{block}",
    )  # fmt: skip
    sums = node.outputs[0]
    sums.name = f"{first.name}_sums_of_{block}"
    if first.shape is not None:
        *rows, depth = first.shape.dims
        count = -(-depth // block) if isinstance(depth, int) else None
        sums.shape = ir.Shape([*rows, count])
    dialect.type_results(node, op)
    decide(node, "body", Preference("sums of groups, a small part of the products that read them"))
    before.graph.insert_before(before, node)
    return sums


def add_offsets(
    product: ir.Node, old: ir.Node, sums: ir.Value, offsets: Sequence[ir.Value]
) -> list[ir.Node]:
    """What follows a product to make the result of `old` of it; the Add is the last node.

    Args:
        product: In place of `old`, without the offsets.
        old: What is replaced.
        sums: Of groups of its activations.
        offsets: [K/G, N]; or int8 and floats per column.
    """
    result, nodes = old.outputs[0], list[ir.Node]()
    product.outputs[0].name = f"{result.name}_scaled"
    table = offsets[0]
    if len(offsets) == 2:
        wide = ir.node("Cast", offsets[:1], {"to": ir.DataType.FLOAT}, name=f"{old.name}_widen")
        scaled = ir.node("Mul", [wide.outputs[0], offsets[1]], name=f"{old.name}_offsets")
        nodes, table = [wide, scaled], scaled.outputs[0]
    moved = ir.node("MatMul", [sums, table], name=f"{old.name}_by_offsets")
    add = ir.node("Add", [product.outputs[0], moved.outputs[0]], name=f"{old.name}_moved")
    shape = constant(offsets[0])
    assert shape is not None
    for node in (*nodes, moved):
        value = node.outputs[0]
        value.name, value.dtype = f"{node.name}_value", ir.DataType.FLOAT
        value.shape = result.shape if node is moved else ir.Shape(shape.shape)
        decide(node, "float", "offsets of groups, times the sums of their activations")
    product.outputs[0].type, product.outputs[0].shape = result.type, result.shape
    decide(add, "float", "adds the offsets of groups")
    return [*nodes, moved, add]
