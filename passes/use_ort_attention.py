"""Hand attention to ONNX Runtime's own op, where its provider has fast kernels of it.

    MatMul(Softmax(MatMul(Q, Transpose(K)) * scale + mask), V)
        =>   com.microsoft.MultiHeadAttention(Q, K, V, mask)

For GPUs: its CUDA provider takes FlashAttention or the like there, in float16 and float32, and no
scores are written to memory.  Its own fusion does not find attention between our products.  Keys
and values are read as [batch, heads, tokens, D], as a cache holds them, or as
[batch, tokens, heads * D], as a projection makes them; queries in the latter form.  A mask gets its
full size, [., ., queries, keys].  Where rows that are masked throughout are to be zeros, whatever
the op makes of them, they become that after it:

    MatMul(Where(IsNaN(p), 0, p), V)
        =>   Where(ReduceMax(mask) >= lowest, MultiHeadAttention(Q, K, V, mask), 0)

`match_attention` says which spellings are found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qcompiler.ir.decisions import decide
from qcompiler.ir.graph import new_initializer, replace_nodes, same_dimension
from qcompiler.passes.attention_operand import Mismatch, Operand
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.match_attention import Attention, match_attention

__all__ = ["UseOrtAttention"]

_DOMAIN = "com.microsoft"


class UseOrtAttention(ir.passes.InPlacePass):
    """Replace attention by MultiHeadAttention.

    Attributes:
        wanted: Whether the target's provider has fast kernels of it; else nothing is changed.
    """

    def __init__(self, wanted: bool = True) -> None:
        super().__init__()
        self.wanted = wanted

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace every attention of the main graph that the op can compute."""
        nodes = [node for node in model.graph if node.op_type == "Softmax" and node.domain == ""]
        replaced = sum(self._try_replace(model, node) for node in nodes if self.wanted)
        if replaced:
            model.graph.opset_imports[_DOMAIN] = 1
            common.RemoveUnusedNodesPass()(model)
            FixNames()(model)
        return ir.passes.PassResult(model, replaced > 0)

    def _try_replace(self, model: ir.Model, softmax: ir.Node) -> bool:
        try:
            found = match_attention(softmax, may_group=False)
            heads = _heads(found)
        except Mismatch as reason:
            decide(softmax, "float", f"not {_DOMAIN}.MultiHeadAttention: {reason}")
            return False
        _Rewrite(model, softmax, found, heads).run()
        return True


def _heads(found: Attention) -> int:
    """How many there are.

    Raises:
        Mismatch: The op does not compute this attention.
    """
    counts, batches = set(), []
    for operand in found.operands:
        assert operand.value.shape is not None
        counts.add(operand.value.shape[2 if operand.tokens_first else 1])
        batches.append(operand.value.shape[0])
    count = counts.pop()
    if counts or not isinstance(count, int):
        raise Mismatch("q, k and v do not have one known number of heads")
    if not all(same_dimension(batches[0], batch) for batch in batches[1:]):
        raise Mismatch("q, k and v are not known to be of one batch")
    _, key, value = found.operands
    if key.tokens_first != value.tokens_first:
        raise Mismatch("keys and values are in different orders")
    return count


class _Rewrite:
    """Builds the nodes of one attention in the place of its last."""

    def __init__(self, model: ir.Model, softmax: ir.Node, found: Attention, heads: int) -> None:
        self.graph, self.softmax, self.found = model.graph, softmax, found
        self.heads, self.stem = heads, softmax.name or "attention"
        dtype = found.result.dtype
        assert dtype is not None
        self.nodes, self.dtype = list[ir.Node](), dtype

    def run(self) -> None:
        """Put the op where the last node covered was."""
        found = self.found
        query, key, value = found.operands
        q = self._in_rows(query)
        joined = key.tokens_first
        k, v = (self._in_rows(kv) if joined else kv.value for kv in (key, value))
        operands: list[ir.Value | None] = [q, k, v]
        if found.mask is not None:
            mask = self._full_mask(self._bounded(found.mask), q, k, 1 if joined else 2)
            operands += [None, None, mask]
        attributes: dict[str, Any] = {"num_heads": self.heads, "scale": float(found.scale)}
        result = self._op("MultiHeadAttention", operands, attributes, domain=_DOMAIN)
        attention = self.nodes[-1]
        result = self._op("Reshape", [result, self._sizes("heads", 0, 0, self.heads, found.depth)])
        if found.mask is not None and found.guarded:
            result = self._op("Where", [self._seen(found.mask), result, self._number("zero", 0)])
        if not found.tokens_first:
            result = self._op("Transpose", [result], {"perm": [0, 2, 1, 3]})
        attention.name = self.stem
        last = found.result.producer()
        assert last is not None
        replace_nodes([last], self.nodes)
        for node in self.nodes:
            decide(node, "float", "around attention")
        decide(attention, "float", "ONNX Runtime's own attention: no scores are written to memory")

    def _in_rows(self, operand: Operand) -> ir.Value:
        """[batch, tokens, heads * D], which is often what was reshaped."""
        value = operand.value
        if not operand.tokens_first:
            value = self._op("Transpose", [value], {"perm": [0, 2, 1, 3]})
        maker = value.producer()
        source = maker.inputs[0] if maker is not None and maker.op_type == "Reshape" else None
        if source is not None and _is_joined(source, value, self.heads * self.found.depth):
            return source
        return self._op(
            "Reshape", [value, self._sizes("rows", 0, 0, self.heads * self.found.depth)]
        )

    def _full_mask(self, mask: ir.Value, q: ir.Value, k: ir.Value, axis: int) -> ir.Value:
        """Expand(mask, [1, 1, queries, keys])."""
        ones = self._sizes("ones", 1, 1)
        queries = self._op("Shape", [q], {"start": 1, "end": 2}, dtype=ir.DataType.INT64)
        keys = self._op("Shape", [k], {"start": axis, "end": axis + 1}, dtype=ir.DataType.INT64)
        sizes = self._op("Concat", [ones, queries, keys], {"axis": 0}, dtype=ir.DataType.INT64)
        return self._op("Expand", [mask, sizes])

    def _bounded(self, mask: ir.Value) -> ir.Value:
        """The mask without minus infinity, of which a row alone makes NaN.

        Nor what becomes that in kernels that take 2^x, and multiply by log2(e) before.
        """
        half = float(np.finfo(self.dtype.numpy()).min) / 2
        return self._op("Max", [mask, self._number("least", half)])

    def _seen(self, mask: ir.Value) -> ir.Value:
        """Which queries see any key, [., queries, heads, 1]."""
        last = self._sizes("last", -1)
        most = self._op("ReduceMax", [mask, last], {"keepdims": 1})
        most = self._op("Expand", [most, self._sizes("four", 1, 1, 1, 1)])
        turned = self._op("Transpose", [most], {"perm": [0, 2, 1, 3]})
        lowest = self._number("lowest", float(np.finfo(self.dtype.numpy()).min))
        return self._op("GreaterOrEqual", [turned, lowest], dtype=ir.DataType.BOOL)

    def _number(self, stem: str, value: float) -> ir.Value:
        array = np.asarray(value, self.dtype.numpy())
        return new_initializer(self.graph, f"{self.stem}_{stem}", array)

    def _sizes(self, stem: str, *sizes: int) -> ir.Value:
        return new_initializer(self.graph, f"{self.stem}_{stem}", np.asarray(sizes, np.int64))

    def _op(
        self,
        op: str,
        inputs: list[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes, domain=domain)
        count = len(self.nodes)
        node.name = f"{self.stem}_{op}_{count}"
        node.outputs[0].name = f"{self.stem}_{count}"
        node.outputs[0].dtype = dtype or self.dtype
        self.nodes.append(node)
        return node.outputs[0]


def _is_joined(source: ir.Value, value: ir.Value, width: int) -> bool:
    """Whether a Reshape from `source` to `value` only split its last dimension."""
    if source.shape is None or value.shape is None or len(source.shape) != 3:
        return False
    return source.shape[2] == width and list(source.shape[:2]) == list(value.shape[:2])
