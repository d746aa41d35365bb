"""Outline attention as one function.

    MatMul(Softmax(MatMul(Q, Transpose(K)) * scale + mask), V)
        =>   MaskedAttention_D64_ssss(Q, K, V, scale, mask)

`match_attention` says which spellings are found.  The function's body is the same computation in
standard ops; transposes between [batch, tokens, heads, D] and [batch, heads, tokens, D] around it
are part of it, because a kernel reads and writes either order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qcompiler.ir.attention import PRECISIONS
from qcompiler.ir.decisions import decide, decision_of, is_kept_float, region_of
from qcompiler.ir.errors import OptionError
from qcompiler.ir.graph import constant, new_initializer, replace_nodes
from qcompiler.ir.region import HALF, Region
from qcompiler.passes.attention_operand import Mismatch
from qcompiler.passes.match_attention import Attention, match_attention
from qcompiler.passes.outlining import RegionPass, outline

__all__ = ["FuseAttention"]

_SHAPING = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Split", "Slice", "Gather"}
_MOVING = _SHAPING | {"Concat", "Add", "Sub", "Mul", "Div", "Neg", "Identity", "RotaryEmbedding"}
"""Ops between a projection and its attention: heads, a bias, a rotary embedding, a cache."""
_DOMAINS = ("", "com.microsoft")


class FuseAttention(RegionPass):
    """Outline the attentions that have a kernel.

    Attributes:
        supports: Says why there is no kernel for a region, or None if there is one.
        options: What kernels may round.
    """

    @dataclasses.dataclass(frozen=True)
    class Options:
        """What kernels may round.

        Attributes:
            precision: What a kernel may round the factors of both products to, where the processor
                multiplies those: int8, bfloat16 or float32.  By default int8 where q, k and v are
                results of int8 products, good to 30 to 40 dB themselves, as is attention in int8;
                else float32, as where outlying channels of those are multiplied in float, or a node
                of the attention is kept float.
        """

        precision: str | None = None

        def __post_init__(self) -> None:
            """Check the value.

            Raises:
                OptionError: It is none of the three.
            """
            if self.precision is not None and self.precision not in tuple(PRECISIONS):
                raise OptionError(
                    f"attention {self.precision!r}: must be float32, bfloat16 or int8"
                )

    def __init__(
        self, supports: Callable[[Region], str | None], options: Options | None = None
    ) -> None:
        super().__init__(supports)
        self.options = options or self.Options()

    def outline_all(self, model: ir.Model) -> bool:
        """Outline every supported attention of the main graph."""
        nodes = [node for node in model.graph if node.op_type == "Softmax" and node.domain == ""]
        fused = sum(self._try_fuse(model, node) for node in nodes)
        if fused:
            common.RemoveUnusedNodesPass()(model)
        return fused > 0

    def _try_fuse(self, model: ir.Model, softmax: ir.Node) -> bool:
        try:
            found = match_attention(softmax)
        except Mismatch as reason:
            # What ORT makes of the pairs around a softmax has been said.
            if softmax.outputs[0].uses() and decision_of(softmax).action != "qdq":
                decide(softmax, "float", f"not fused as attention: {reason}")
            return False
        anchor = "Attention" if found.mask is None else "MaskedAttention"
        precision = self.options.precision
        if precision is None:
            quantized = all(_is_quantized(operand.value) for operand in found.operands)
            precision = "int8" if quantized else "float32"
        if _is_kept(found):
            precision = "float32"
        half = found.operands[0].value.dtype is ir.DataType.FLOAT16
        flags = (*found.flags, *PRECISIONS[precision], *((HALF,) if half else ()))
        region = Region(anchor, (("D", found.depth),), flags=flags)
        if (missing := self.supports(region)) is not None:
            decide(softmax, "float", missing)
            return False
        _replace(model, softmax, found, region)
        return True


def _is_kept(found: Attention) -> bool:
    """Whether somebody decided that a product of an attention, or its softmax, stays float."""
    ends = {found.mask, *(operand.value for operand in found.operands)}
    values = [found.result]
    for value in values:
        node = value.producer()
        if node is None or value in ends:
            continue
        if is_kept_float(node):
            return True
        data = node.inputs[:1] if node.op_type in _SHAPING else node.inputs  # not the sizes
        values.extend(read for read in data if read is not None and read not in values)
    return False


def _is_quantized(value: ir.Value) -> bool:
    """Whether `value` comes from a quantized product, through ops that move or combine elements.

    Not from one whose outlying channels are multiplied in float (`split_outliers`): those may be
    most of its result, which then is better than 8 bits.
    """
    found, seen, quantized = [value], {value}, False
    for current in found:
        node = current.producer()
        if node is None:
            continue
        if _multiplies_outliers(node):
            return False
        region = region_of(node)
        if isinstance(region, Region) and region.anchor.startswith("QMatMul"):
            quantized = True
            added = node.inputs[len(node.inputs) - len(region.extras) :]
            if any(
                each and (made := each.producer()) and _multiplies_outliers(made) for each in added
            ):
                return False
            continue
        if node.domain not in _DOMAINS or node.op_type not in _MOVING:
            continue
        for operand in node.inputs:
            if operand is not None and operand not in seen:
                seen.add(operand)
                found.append(operand)
    return quantized


def _multiplies_outliers(node: ir.Node) -> bool:
    """Whether a product is of a few channels, MatMul(Gather(x, indices), W)."""
    if node.op_type != "MatMul" or node.inputs[0] is None:
        return False
    gather = node.inputs[0].producer()
    return (
        gather is not None
        and gather.op_type == "Gather"
        and (gather.attributes.get_int("axis", 0) == -1 and constant(gather.inputs[1]) is not None)
    )


def _replace(model: ir.Model, softmax: ir.Node, found: Attention, region: Region) -> None:
    scale = new_initializer(model.graph, f"{softmax.name}_scale", np.array(found.scale, np.float32))
    inputs = [*(operand.value for operand in found.operands), scale]
    inputs += [] if found.mask is None else [found.mask]
    new = outline(model, region, inputs)
    new.name = softmax.name
    decide(new, "body", "scores, softmax and context in one")
    last = found.result.producer()
    assert last is not None
    replace_nodes([last], [new])
