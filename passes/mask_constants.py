"""Bring the constants of attention masks into the range of float16.

    Softmax(scores + Where(seen, 0, -3.4e38))   =>   Softmax(scores + Where(seen, 0, -30000))

A mask is a constant that goes nowhere but into a Softmax, through ops that move, choose or add, and
is low enough to leave nothing of what it is added to.  Twice what it becomes is still in float16's
range, and so is a score below that, down to -5000: two masks may meet, and minus infinity would
make NaN of a row that is masked throughout.  What is masked weighs 0 as before; such a row alone is
another, weighed by its scores where all were equal.  Part of `convert_float16`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.ir.decisions import add_note
from qcompiler.ir.graph import constant, drop_if_unread, new_initializer

__all__ = ["MASKED", "clamp_masks"]

MASKED = -30000.0
"""What a mask is in float16, whose lowest number is -65504."""

_LOW = -1000.0
"""Whatever is added to scores is a mask if it is below: e^-1000 is 0 in float32 as well."""

_MASKING = frozenset({
    "Add", "Concat", "Expand", "Gather", "GatherElements", "GatherND", "Identity", "Max", "Min",
    "Mul", "Reshape", "Slice", "Squeeze", "Sub", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where",
})  # fmt: skip


def clamp_masks(model: ir.Model) -> tuple[bool, set[ir.Value]]:
    """Bring the masks of a model into range, and say so on the nodes that read them.

    Returns:
        Whether one was out of it, and all values between a mask and its Softmax: how low they are
        is no matter.
    """
    changed, masked = False, set[ir.Value]()
    for value in list(model.graph.initializers.values()):
        array = constant(value)
        if array is None or array.dtype != np.float32 or not (array < _LOW).any():
            continue
        made = _up_to_softmax(value)
        masked.update(made)
        beyond = np.isfinite(array) & (array < MASKED)
        if not made or not beyond.any():
            continue
        clamped = np.where(beyond, np.float32(MASKED), array).astype(np.float32)
        new = new_initializer(model.graph, f"{value.name}_float16_mask", clamped)
        for node in dict.fromkeys(use.node for use in value.uses()):
            add_note(node, f"a mask of {array[beyond].min():.3g} is {MASKED:g} in float16")
        ir.convenience.replace_all_uses_with(value, new)
        drop_if_unread(value)
        changed = True
    return changed, masked


def _up_to_softmax(value: ir.Value) -> list[ir.Value]:
    """A constant and what is made of it, if all that ends in a Softmax, and something does."""
    found, seen, reached = [value], {value}, False
    for current in found:
        if current.is_graph_output():
            return []
        for node, index in current.uses():
            if node.domain == "" and node.op_type == "Softmax":
                reached = True
                continue
            if node.domain != "" or node.op_type not in _MASKING:
                return []
            if node.op_type == "Sub" and index == 1:
                return []
            new = [result for result in node.outputs if result not in seen]
            seen.update(new)
            found.extend(new)
    return found if reached else []
