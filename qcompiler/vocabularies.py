"""How large the integers may be that a model's inputs take: they look up rows of its tables."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from qcompiler.ir.graph import constant

__all__ = ["vocabularies", "vocabularies_of_file"]

_PASS = frozenset({
    "Cast", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose",
    "Unsqueeze",
})  # fmt: skip
"""Ops between an input and a table that leave its integers what they are."""


def vocabularies(model: ir.Model) -> dict[str, int]:
    """The inputs that are indices into tables of weights, and the length of the shortest."""
    found: dict[str, int] = {}
    for node in model.graph:
        if node.op_type != "Gather" or len(node.inputs) < 2:
            continue
        sizes, ids = _table_sizes(node.inputs[0]), _origin(node.inputs[1])
        axis = node.attributes.get_int("axis", 0)
        if sizes and ids is not None and ids.is_graph_input() and -len(sizes) <= axis < len(sizes):
            name, length = ids.name or "", sizes[axis]
            found[name] = min(length, found.get(name, length))
    return found


def vocabularies_of_file(path: Path) -> dict[str, int]:
    """The same of an ONNX file; of one that cannot be read nothing is known."""
    try:
        return vocabularies(ir.load(path))
    except Exception:
        # The readers share no type of exception, and whoever opens a session is told what is wrong.
        return {}


def _table_sizes(value: ir.Value | None) -> tuple[int, ...]:
    """The shape of a constant, as it is stored or dequantized; empty if it is none."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type in ("Cast", "DequantizeLinear", "Identity"):
        return _table_sizes(node.inputs[0])
    array = constant(value)
    return () if array is None else array.shape


def _origin(value: ir.Value | None) -> ir.Value | None:
    node = value.producer() if value is not None else None
    if node is None or node.op_type not in _PASS or not node.inputs:
        return value
    return _origin(node.inputs[0])
