"""Bring the constants of attention masks into the range of float16.

    Softmax(scores + Where(seen, 0, -3.4e38))   =>   Softmax(scores + Where(seen, 0, -32752))

A mask is a constant below -65504 that goes nowhere but into a Softmax, through ops that move,
choose or add.  It becomes half of float16's lowest number, so that two masks may meet and a score
be added: minus infinity would make NaN of a row that is masked throughout.  What is masked weighs 0
as before; such a row alone is another, weighed by its scores where all were equal.  Part of
`convert_float16`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.ir.decisions import add_note
from qcompiler.ir.graph import constant, drop_if_unread, new_initializer

__all__ = ["MASKED", "clamp_masks"]

MASKED = -32752.0
"""What a mask is in float16."""

_LOWEST = float(np.finfo(np.float16).min)

_MASKING = frozenset({
    "Add", "Concat", "Expand", "Gather", "GatherElements", "GatherND", "Identity", "Max", "Min",
    "Mul", "Reshape", "Slice", "Squeeze", "Sub", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where",
})  # fmt: skip


def clamp_masks(model: ir.Model) -> bool:
    """Replace the masks of a model, and say so on the nodes that read them."""
    changed = False
    for value in list(model.graph.initializers.values()):
        array = constant(value)
        if array is None or array.dtype != np.float32 or not array.size:
            continue
        beyond = np.isfinite(array) & (array < _LOWEST)
        if not beyond.any() or not _only_masks(value):
            continue
        clamped = np.where(beyond, np.float32(MASKED), array).astype(np.float32)
        new = new_initializer(model.graph, f"{value.name}_float16_mask", clamped)
        for node in dict.fromkeys(use.node for use in value.uses()):
            add_note(node, f"a mask of {array[beyond].min():.3g} is {MASKED:g} in float16")
        ir.convenience.replace_all_uses_with(value, new)
        drop_if_unread(value)
        changed = True
    return changed


def _only_masks(value: ir.Value) -> bool:
    """Whether all that is made of a constant ends in a Softmax, and something does."""
    found, seen, reached = [value], {value}, False
    for current in found:
        if current.is_graph_output():
            return False
        for node, index in current.uses():
            if node.domain == "" and node.op_type == "Softmax":
                reached = True
                continue
            if node.domain != "" or node.op_type not in _MASKING:
                return False
            if node.op_type == "Sub" and index == 1:
                return False
            new = [result for result in node.outputs if result not in seen]
            seen.update(new)
            found.extend(new)
    return reached
