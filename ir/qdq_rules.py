"""What ONNX asks of the operands of a QuantizeLinear or DequantizeLinear.

No schema checks these, and shape inference stops at unknown shapes; ONNX Runtime finds some when
it opens a model and some only when it runs it.  What is not known of an operand is not held
against it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qcompiler.ir.granularity import PerGroup
from qcompiler.ir.graph import constant, every_node, label

__all__ = ["qdq_problems"]

_D = ir.DataType
_REAL = (_D.FLOAT, _D.FLOAT16, _D.BFLOAT16)
_FLOATS = (*_REAL, _D.FLOAT8E8M0)
_OPSET = {
    **dict.fromkeys(("INT8", "UINT8", "INT32"), 10),
    **dict.fromkeys(("FLOAT8E4M3FN", "FLOAT8E5M2", "FLOAT8E4M3FNUZ", "FLOAT8E5M2FNUZ"), 19),
    **dict.fromkeys(("INT4", "UINT4", "INT16", "UINT16"), 21),
    "FLOAT4E2M1": 23,
    **dict.fromkeys(("INT2", "UINT2"), 25),
    **dict.fromkeys(("FLOAT6E2M3", "FLOAT6E3M2"), 28),
}
"""The first opset in which a type can be stored, by name: older onnx_ir lack the newest."""

_NEWEST = max(_OPSET.values())


def qdq_problems(model: ir.Model) -> Iterator[tuple[str, str, str]]:
    """Rule, node and problem of every Q and DQ that breaks a rule."""
    opset = model.graph.opset_imports.get("", 1)
    for node in every_node(model.graph):
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        if node.domain in ("", "com.microsoft"):
            # com.microsoft's take every type at any opset.
            for rule, problem in _problems(node, opset if node.domain == "" else _NEWEST):
                yield rule, label(node), problem


def _problems(node: ir.Node, opset: int) -> Iterator[tuple[str, str]]:
    data, scale, zero = (*node.inputs, None, None)[:3]
    if data is None or scale is None:
        yield "has-scale", f"{node.op_type} has no {'input' if data is None else 'scale'}"
        return
    stored = node.outputs[0] if node.op_type == "QuantizeLinear" else data
    of_integers = scale.dtype is _D.INT32 and data.dtype is _D.INT32
    if scale.dtype not in (None, *_FLOATS) and not of_integers:
        yield "float-scale", f"its scale is {scale.dtype}, and may be FLOAT, FLOAT16 or BFLOAT16"
    if stored.dtype is not None and opset < (since := _OPSET.get(stored.dtype.name, _NEWEST + 1)):
        why = f"needs opset {since}, not {opset}" if since <= _NEWEST else "nothing is quantized to"
        yield "storage", f"it stores {stored.dtype}, which {why}"
    asked = node.attributes.get_int("output_dtype", 0) if stored is not data else 0
    if asked and stored.dtype not in (None, asked):
        yield "output-dtype", f"output_dtype is {_D(asked)}, its output {stored.dtype}"
    if zero is not None and None not in (zero.dtype, stored.dtype) and zero.dtype != stored.dtype:
        yield "zero-point-dtype", f"its zero point is {zero.dtype}, what it stores {stored.dtype}"
    if zero is not None and not _same_shape(scale, zero):
        shapes = f"{_text(zero)}, its scale {_text(scale)}"
        yield "zero-point-shape", f"its zero point has shape {shapes}"
    zeros = constant(zero) if stored.dtype is _D.INT32 else None
    if zeros is not None and np.any(zeros):
        first = zeros[zeros != 0][0]
        yield "zero-point", f"its zero point is {first}, and under INT32 ONNX asks for 0"
    yield from _results(node, data, scale, opset)
    yield from _granularity(node, data, scale)


def _results(
    node: ir.Node, data: ir.Value, scale: ir.Value, opset: int
) -> Iterator[tuple[str, str]]:
    """The side of the floats, and the shape of both."""
    result = node.outputs[0]
    if node.op_type == "QuantizeLinear":
        if data.dtype not in (None, *_REAL, _D.INT32):  # ONNX has a Q of INT32, ORT does not
            yield "float-input", f"it quantizes {data.dtype}, and may FLOAT, FLOAT16 or BFLOAT16"
        elif opset < 23 and len({data.dtype, scale.dtype} & set(_REAL)) == 2:
            problem = f"it quantizes {data.dtype} by a scale of {scale.dtype}, before opset 23"
            yield "float-input", problem
    else:
        asked = node.attributes.get_int("output_dtype", 0) or scale.dtype
        if asked in _REAL and result.dtype not in (None, asked):
            yield "output-dtype", f"its output is {result.dtype}, and should be {_D(asked)}"
    # What a model says of its own outputs stays as it came: ORT warns, and runs it.
    said = result.is_graph_output() or data.is_graph_output()
    if not said and not _same_shape(result, data):
        yield "output-shape", f"its output has shape {_text(result)}, its input {_text(data)}"


def _granularity(node: ir.Node, data: ir.Value, scale: ir.Value) -> Iterator[tuple[str, str]]:
    if data.shape is None or scale.shape is None:
        return
    rank, axis = len(data.shape), node.attributes.get_int("axis", 1)
    block = node.attributes.get_int("block_size", 0)
    if _is_single(scale):
        if block and len(scale.shape) != rank:
            yield "block-size", f"its block_size is {block}, and there is one scale for all"
        return
    if len(scale.shape) == 1 and not isinstance(scale.shape[0], int):
        return  # it may turn out to be one
    if not -rank <= axis < rank:
        yield "axis", f"axis {axis} of {data.name!r} of shape {_text(data)} does not exist"
        return
    if block < 0:
        yield "block-size", f"its block_size is {block}"
    elif block:
        yield from _blocks(data, scale, PerGroup(axis % rank, block))
    elif len(scale.shape) != 1:
        yield (
            "scale-shape",
            f"its scale has shape {_text(scale)}: without a block_size it is one, or one per slice",
        )
    elif _differ(scale.shape[0], data.shape[axis]):
        shapes = f"{_text(scale)}, axis {axis} of {_text(data)} takes {data.shape[axis]}"
        yield "scale-shape", f"its scale has shape {shapes}"


def _blocks(data: ir.Value, scale: ir.Value, blocks: PerGroup) -> Iterator[tuple[str, str]]:
    assert data.shape is not None and scale.shape is not None
    wanted = [
        -(-size // blocks.group_size) if i == blocks.axis and isinstance(size, int) else size
        for i, size in enumerate(data.shape)
    ]
    if len(data.shape) != len(scale.shape) or any(
        _differ(a, b)
        for i, (a, b) in enumerate(zip(scale.shape, wanted, strict=True))
        if i != blocks.axis or isinstance(wanted[i], int)
    ):
        yield (
            "scale-shape",
            f"its scale has shape {_text(scale)}, blocks of {blocks.group_size} along axis "
            f"{blocks.axis} of {_text(data)} take {_text_of(wanted)}",
        )


def _is_single(value: ir.Value) -> bool:
    """Whether it is one number: ORT takes a list of one as it takes a scalar."""
    shape = value.shape
    return shape is not None and (len(shape) == 0 or (len(shape) == 1 and shape[0] == 1))


def _same_shape(a: ir.Value, b: ir.Value) -> bool:
    if a.shape is None or b.shape is None or (_is_single(a) and _is_single(b)):
        return True
    return len(a.shape) == len(b.shape) and not any(map(_differ, a.shape, b.shape))


def _differ(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> bool:
    """Whether two sizes are known, and not equal."""
    return isinstance(a, int) and isinstance(b, int) and a != b


def _text(value: ir.Value) -> str:
    return "unknown" if value.shape is None else _text_of(list(value.shape))


def _text_of(sizes: list[int | ir.SymbolicDim]) -> str:
    return f"[{', '.join(str(size) for size in sizes)}]"
