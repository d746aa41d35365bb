"""Norms that compute in float32 between float16: what `convert_float16` leaves of RMSNorm.

    y = Cast <to = FLOAT16> (norm(Cast <to = FLOAT> (x)))   =>   the norm from x to y

A kernel sums in float32 inside, whatever it reads and makes.  Part of `fuse_norms`.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import constant, only_consumer
from qcompiler.passes.match_norms import Norm

__all__ = ["between_casts"]

_HALF, _WIDE = ir.DataType.FLOAT16, ir.DataType.FLOAT


def between_casts(norm: Norm) -> Norm | None:
    """The norm with the Casts around it; None where it has none, or its parameters do not fit."""
    before = norm.x.producer()
    after = only_consumer(norm.result)
    if norm.x.dtype is not _WIDE or before is None or after is None:
        return None
    x = _operand(before, _WIDE)
    if x is None or x.dtype is not _HALF or _operand(after, _HALF) is None:
        return None
    if before.graph is not after.graph or after.graph is not norm.nodes[-1].graph:
        return None
    if not all(_fits(value) for value in (norm.gamma, norm.beta) if value is not None):
        return None
    readers = {use.node for use in norm.x.uses()}
    alone = readers <= set(norm.nodes) and not norm.x.is_graph_output()
    nodes = [*([before] if alone else []), *norm.nodes, after]
    return dataclasses.replace(norm, x=x, nodes=nodes)


def _operand(node: ir.Node, target: ir.DataType) -> ir.Value | None:
    """What a Cast to `target` reads."""
    casts = node.op_type == "Cast" and node.domain == "" and node.outputs[0].dtype is target
    return node.inputs[0] if casts else None


def _fits(value: ir.Value) -> bool:
    """Whether float16 holds each of these numbers to its full precision."""
    array = constant(value)
    limits = np.finfo(np.float16)
    if array is None or array.dtype != np.float32:
        return False
    magnitudes = np.abs(array[array != 0])
    return bool(((magnitudes >= limits.tiny) & (magnitudes <= limits.max)).all())
