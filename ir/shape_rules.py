"""What shapes the results of ai.onnx's ops have, by ONNX's own inference of one node at a time.

A whole inference after every pass would take as long as the pass; but a model has few kinds of
nodes, and of each kind results are inferred once.  What is not known of a shape is not held
against it, nor are the names of open dimensions.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from qcompiler.ir.graph import every_node, label

__all__ = ["shape_problems"]

_SMALL = 64
"""Bytes of a constant of integers that may be a shape, axes or pads: shapes depend on those."""

_PLAIN = (int, float, str, tuple)

_Sizes = tuple[int | None, ...] | None
"""Sizes, None for one that is open; or nothing is known."""

_Attributes = tuple[tuple[str, int, Any], ...]

_Operand = tuple[int, _Sizes, bytes] | None
"""Data type or 0, shape, and what it holds if that is small and constant; None is left out."""


def shape_problems(model: ir.Model) -> Iterator[tuple[str, str, str]]:
    """Rule, node and problem of every node whose results have other shapes than they should.

    Results that leave their graph are passed over: what a source says of its outputs stays as it
    came, and ONNX Runtime runs it.  So are nodes with graphs inside, and those that read sequences.
    """
    opset = model.graph.opset_imports.get("", 1)
    seen: dict[ir.Value | None, _Operand] = {}
    for node in every_node(model.graph):
        if node.domain != "":
            continue
        for value in (*node.inputs, *node.outputs):
            if value not in seen:
                seen[value] = _operand(value)
        attributes = _attributes(node)
        if attributes is not None:
            operands = tuple([seen[value] for value in node.inputs])
            said = tuple([None if v.is_graph_output() else seen[v] for v in node.outputs])
            if problem := _problem(node.op_type, opset, attributes, operands, said):
                yield "onnx-shapes", label(node), problem


def _operand(value: ir.Value | None) -> _Operand:
    if value is None:
        return None
    kind, shape, tensor = value.type, value.shape, value.const_value
    sizes = None if shape is None else tuple([d if type(d) is int else None for d in shape])
    if type(kind) is not ir.TensorType:
        return 0, sizes, b""
    held = b""
    if tensor is not None and kind.dtype is ir.DataType.INT64 and tensor.nbytes <= _SMALL:
        held = b"=" + np.asarray(tensor.numpy(), "<i8").tobytes()
    return int(kind.dtype), sizes, held


def _attributes(node: ir.Node) -> _Attributes | None:
    """Those of a node, in a form that can be compared; None if one is a graph or a tensor."""
    given = node.attributes.data
    if not given:
        return ()
    if not all(isinstance(each.value, _PLAIN) for each in given.values()):
        return None
    return tuple((each.name, int(each.type), each.value) for each in given.values())


@functools.lru_cache(maxsize=1 << 16)  # each takes ONNX 50 microseconds
def _problem(
    op: str,
    opset: int,
    attributes: _Attributes,
    operands: tuple[_Operand, ...],
    said: tuple[_Operand, ...],
) -> str | None:
    """What is wrong; it names no value: a source's own then stays the same after every pass."""
    if any(operand is not None and not operand[0] for operand in operands):
        return None
    of = " and ".join(_text(operand[1]) for operand in operands if operand)
    try:
        found = _inferred(op, opset, attributes, operands, len(said))
    except onnx.shape_inference.InferenceError as error:
        return f"{op} of {of}: {' '.join(str(error).partition('] ')[2].split())}"
    except Exception:
        return None  # a mistake that other rules name, or an op that ONNX infers no node of
    for result, wanted in zip(said, found, strict=False):
        shape = None if result is None else result[1]
        if shape is not None and wanted is not None and _differ(shape, wanted):
            return f"{op} of {of} makes {_text(wanted)}, and says that it is {_text(shape)}"
    return None


def _inferred(
    op: str, opset: int, attributes: _Attributes, operands: Sequence[_Operand], results: int
) -> list[_Sizes]:
    """The shapes of results.

    Raises:
        InferenceError: The operands do not fit each other.
    """
    make, names = onnx.helper, ["" if o is None else f"i{i}" for i, o in enumerate(operands)]
    outputs = [f"o{index}" for index in range(results)]
    node = make.make_node(op, names, outputs)
    given = (make.make_attribute(name, value, attr_type=kind) for name, kind, value in attributes)
    node.attribute.extend(given)
    types, held = {}, {}
    for name, operand in zip(names, operands, strict=True):
        if operand is not None:
            dtype, sizes, content = operand
            types[name] = make.make_tensor_type_proto(dtype, sizes)
            if content:
                held[name] = make.make_tensor(name, dtype, sizes or (), content[1:], raw=True)
    found = onnx.shape_inference.infer_node_outputs(
        onnx.defs.get_schema(op, opset, ""), node, types, held,
        opset_imports=[make.make_opsetid("", opset)],
    )  # fmt: skip
    return [_written(found.get(name)) for name in outputs]


def _written(type: onnx.TypeProto | None) -> _Sizes:
    if type is None or not type.HasField("tensor_type") or not type.tensor_type.HasField("shape"):
        return None
    sizes = type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else None for d in sizes)


def _differ(shape: tuple[int | None, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) != len(wanted) or any(
        a is not None and b is not None and a != b for a, b in zip(shape, wanted, strict=True)
    )


def _text(sizes: _Sizes) -> str:
    if sizes is None:
        return "some shape"
    return f"[{', '.join('?' if size is None else str(size) for size in sizes)}]"
