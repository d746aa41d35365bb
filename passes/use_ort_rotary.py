"""Hand rotary embeddings to ONNX Runtime's own op, which reads and writes each head once.

    x cos + Concat(-x[D/2:], x[:D/2]) sin
        =>   com.microsoft.RotaryEmbedding(x, positions, cos[:D/2], sin[:D/2])

Written out they are seven ops on all of x, which take as long as attention over 128 tokens.  Rows
of projections, [batch, tokens, heads * D], are turned before their heads are put first: attention
may not need that.  `match_rotary` says which spellings are found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qcompiler.ir.decisions import decide
from qcompiler.ir.graph import new_initializer, place_after, replace_nodes, same_dimension
from qcompiler.passes.attention_operand import SWAP, order_of
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.match_rotary import Rotary, match_rotary

__all__ = ["UseOrtRotary"]

_DOMAIN = "com.microsoft"


class UseOrtRotary(ir.passes.InPlacePass):
    """Replace rotary embeddings by RotaryEmbedding.

    Attributes:
        wanted: Whether the target's provider is known to gain by it; else nothing is changed.
    """

    def __init__(self, wanted: bool = True) -> None:
        super().__init__()
        self.wanted = wanted

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace every rotary embedding of the main graph that the op can compute."""
        ends = [node for node in model.graph if node.op_type == "Add" and node.domain == ""]
        tables = _Tables(model.graph)
        replaced = 0
        for add in ends if self.wanted else ():
            if (found := match_rotary(add)) is not None:
                _replace(add, found, tables)
                replaced += 1
        if replaced:
            model.graph.opset_imports[_DOMAIN] = 1
            common.RemoveUnusedNodesPass()(model)
            FixNames()(model)
        return ir.passes.PassResult(model, replaced > 0)


class _Tables:
    """The operands that rotary embeddings of the same angles share."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._made = dict[tuple[ir.Value, str], ir.Value]()
        self._numbers = dict[str, ir.Value]()

    def half(self, angles: ir.Value, depth: int) -> ir.Value:
        """The first half of [batch, 1, tokens, D], as [batch * tokens, D / 2]."""
        if (angles, "half") not in self._made:
            bounds = [self.number([n]) for n in (0, depth // 2, 3)]
            nodes = [_node("Slice", [angles, *bounds], angles.dtype)]
            if not _is_shared(angles):
                # The op wants rows for all tokens of a sequence, even of a batch of none.
                one_more = self.number([0, 0, 0, 0, 1, 0, 0, 0])
                nodes.append(_node("Pad", [nodes[-1].outputs[0], one_more], angles.dtype))
            sizes = self.number([-1, depth // 2])
            nodes.append(_node("Reshape", [nodes[-1].outputs[0], sizes], angles.dtype))
            place_after(angles, nodes)
            self._made[angles, "half"] = nodes[-1].outputs[0]
        return self._made[angles, "half"]

    def positions(self, angles: ir.Value) -> ir.Value:
        """Which of those rows each token takes; the first of them if it is the same in a batch."""
        if _is_shared(angles):
            return self.number([0])
        if (angles, "positions") not in self._made:
            self._made[angles, "positions"] = self._all_positions(angles)
        return self._made[angles, "positions"]

    def _all_positions(self, angles: ir.Value) -> ir.Value:
        """0, 1, ..., as [batch, tokens]."""
        integers = ir.DataType.INT64
        batch, tokens = (
            _node("Shape", [angles], integers, {"start": axis, "end": axis + 1}) for axis in (0, 2)
        )
        sizes = _node("Concat", [batch.outputs[0], tokens.outputs[0]], integers, {"axis": 0})
        count = _node("ReduceProd", [sizes.outputs[0]], integers, {"keepdims": 0})
        zero, one = (self.number(number) for number in (0, 1))
        numbers = _node("Range", [zero, count.outputs[0], one], integers)
        shaped = _node(
            "Reshape", [numbers.outputs[0], sizes.outputs[0]], integers, {"allowzero": 1}
        )
        place_after(angles, [batch, tokens, sizes, count, numbers, shaped])
        return shaped.outputs[0]

    def number(self, number: int | list[int]) -> ir.Value:
        """An int64 constant."""
        if str(number) not in self._numbers:
            array = np.asarray(number, np.int64)
            self._numbers[str(number)] = new_initializer(self.graph, "rotary_number", array)
        return self._numbers[str(number)]


def _is_shared(angles: ir.Value) -> bool:
    """Whether all sequences of a batch have the same."""
    assert angles.shape is not None
    return bool(angles.shape[0] == 1)


def _replace(add: ir.Node, found: Rotary, tables: _Tables) -> None:
    angles = [
        tables.positions(found.cos),
        *(tables.half(table, found.depth) for table in (found.cos, found.sin)),
    ]
    rows = _rows_of(found.x)
    if rows is None:
        new = [_node("RotaryEmbedding", [found.x, *angles], found.x.dtype, domain=_DOMAIN)]
    else:
        new = _turned_rows(rows, found, angles, tables)
    for index, node in enumerate(new):
        node.name = add.name if index == 0 or add.name is None else f"{add.name}_{node.op_type}"
    decide(new[0], "float", "ONNX Runtime's own rotary embedding: each head is read once")
    replace_nodes([add], new)


def _turned_rows(
    rows: ir.Value, found: Rotary, angles: list[ir.Value], tables: _Tables
) -> list[ir.Node]:
    """The embedding of [batch, tokens, heads * D], and the heads of that before their tokens."""
    assert found.x.shape is not None
    heads = found.x.shape[1]
    assert isinstance(heads, int)
    rotary = _node(
        "RotaryEmbedding", [rows, *angles], rows.dtype, {"num_heads": heads}, domain=_DOMAIN
    )
    sizes = tables.number([0, 0, heads, found.depth])
    split = _node("Reshape", [rotary.outputs[0], sizes], rows.dtype)
    swap = found.x.producer()
    assert swap is not None and swap.inputs[0] is not None
    rotary.outputs[0].shape, split.outputs[0].shape = rows.shape, swap.inputs[0].shape
    return [rotary, split, _node("Transpose", [split.outputs[0]], rows.dtype, {"perm": SWAP})]


def _rows_of(x: ir.Value) -> ir.Value | None:
    """[batch, tokens, heads * D], of which x is the heads, put before the tokens."""
    swap = x.producer()
    if swap is None or order_of(swap) != SWAP or swap.inputs[0] is None:
        return None
    split = swap.inputs[0].producer()
    rows = split.inputs[0] if split is not None and split.op_type == "Reshape" else None
    if rows is None or rows.shape is None or len(rows.shape) != 3 or x.shape is None:
        return None
    batch, heads, tokens, depth = x.shape
    is_split = isinstance(heads, int) and rows.shape[2] == heads * depth
    is_same = same_dimension(rows.shape[0], batch) and same_dimension(rows.shape[1], tokens)
    return rows if is_split and is_same else None


def _node(
    op: str,
    inputs: Sequence[ir.Value | None],
    dtype: ir.DataType | None,
    attributes: Mapping[str, Any] | None = None,
    domain: str = "",
) -> ir.Node:
    node = ir.node(op, inputs, attributes, domain=domain)
    if dtype is not None:
        node.outputs[0].dtype = dtype
    return node
