"""What a dialect op's signature asks of the operands and results of its nodes.

All inputs and attributes of the function are there, and no others.  Sizes bear names: one that two
operands share is equal in both, and `block_size` is the attribute's.  Operands are known by their
names in the function: a region may have more of them, and only some of the outputs.  What is not
known of an operand is not held against it.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qcompiler.ir import dialect
from qcompiler.ir.decisions import region_of
from qcompiler.ir.graph import every_node, label
from qcompiler.ir.region import HALF

__all__ = ["signature_problems"]


def signature_problems(model: ir.Model) -> Iterator[tuple[str, str, str]]:
    """Rule, node and problem of every node of ours that does not fit its op's signature."""
    for node in every_node(model.graph):
        function = model.functions.get(node.op_identifier())
        if function is None or not dialect.is_ours(node.domain):
            continue
        op = dialect.OPS.get(node.op_type.split("_")[0])
        if op is None:
            yield "dialect-op", label(node), f"{node.op_type} is no op of the dialect"
            continue
        for rule, problem in _incomplete(node, op, function):
            yield rule, label(node), problem
        named = [
            *zip(function.inputs, node.inputs, strict=False),
            *zip(function.outputs, node.outputs, strict=False),
        ]
        operands = {str(formal.name): value for formal, value in named if value is not None}
        region, flags = region_of(node), _flags(node, op, operands)
        for name, value in operands.items():
            wanted = op.type_of(name, flags)
            if region is not None and value.producer() is node:
                wanted = dialect.result_type(region, name)
            if value.dtype not in (None, wanted):
                problem = f"{name} is {value.dtype}, {op.name} needs {wanted.name}"
                yield "operand-dtype", label(node), problem
        for problem in _misfits(node, op, operands):
            yield "operand-shape", label(node), problem


def _flags(node: ir.Node, op: dialect.DialectOp, operands: dict[str, ir.Value]) -> tuple[str, ...]:
    """Those of a region; an op that also works in float16 does if its first operand is that."""
    region = region_of(node)
    if region is not None:
        return region.flags
    first = operands.get(op.inputs[0]) if op.follows else None
    return (HALF,) if first is not None and first.dtype is ir.DataType.FLOAT16 else ()


def _incomplete(
    node: ir.Node, op: dialect.DialectOp, function: ir.Function
) -> Iterator[tuple[str, str]]:
    """Rule and problem of what is missing of the operands and attributes, or too much."""
    given = [*node.inputs, *[None] * len(function.inputs)]
    for formal, value in zip(function.inputs, given, strict=False):
        if value is None:
            yield "operands", f"{op.name} has no {formal.name}"
    for what, got, taken in (
        ("inputs", node.inputs, function.inputs),
        ("outputs", node.outputs, function.outputs),
    ):
        if len(got) > len(taken):
            yield "operands", f"{op.name} has {len(got)} {what}, and its function {len(taken)}"
    for name in function.attributes:
        if name not in node.attributes:
            yield "attributes", f"{op.name} has no attribute {name}"
    for name in node.attributes:
        if name not in function.attributes:
            yield "attributes", f"{op.name} has an attribute {name}, which it does not take"


def _misfits(node: ir.Node, op: dialect.DialectOp, operands: dict[str, ir.Value]) -> Iterator[str]:
    sizes = _known_sizes(node)
    for name, wanted in op.shapes:
        shape = operands[name].shape if name in operands else None
        if shape is None:
            continue
        pairs = _pairs(wanted.split(), list(shape))
        if pairs is None or not all(_fits(symbol, size, sizes) for symbol, size in pairs):
            got = ", ".join(str(size) for size in shape)
            known = [f"{key} = {sizes[key]}" for key in _symbols(wanted) if key in sizes]
            suffix = f" with {', '.join(known)}" if known else ""
            yield f"{name} has shape [{got}], {op.name} needs {_text(wanted)}{suffix}"


def _text(wanted: str) -> str:
    name = wanted.removesuffix("?")
    if name == wanted:
        return f"[{wanted}]"
    return "[] or [1]" if name == "1" else f"[], [1] or [{name}]"


def _known_sizes(node: ir.Node) -> dict[str, int]:
    """Sizes that the node itself states: a region in its record, an op in its attributes."""
    region = region_of(node)
    if region is None:
        numbers = node.attributes.values()
        return {a.name: a.as_int() for a in numbers if a.type is ir.AttributeType.INT}
    sizes = dict(region.sizes)
    block = sizes.get("G", sizes.get("K"))
    return sizes | ({} if block is None else {"block_size": block})


def _pairs(
    wanted: list[str], shape: list[int | ir.SymbolicDim]
) -> list[tuple[str, int | ir.SymbolicDim]] | None:
    """Each size beside its symbol; `*` stands for any number of sizes.  None if ranks differ."""
    if wanted[0].endswith("?"):
        if shape in ([], [1]):
            return []
        wanted = [wanted[0].removesuffix("?")]
    if "*" not in wanted:
        return list(zip(wanted, shape, strict=True)) if len(wanted) == len(shape) else None
    at = wanted.index("*")
    tail = len(wanted) - at - 1
    if len(shape) < at + tail:
        return None
    front = zip(wanted[:at], shape[:at], strict=True)
    back = zip(wanted[at + 1 :], shape[len(shape) - tail :], strict=True)
    return [*front, *back]


def _fits(symbol: str, size: int | ir.SymbolicDim, sizes: dict[str, int]) -> bool:
    """Whether a size may stand where the symbol does; an unknown symbol becomes known."""
    if not isinstance(size, int):
        return True
    if symbol.isdigit():
        return size == int(symbol)
    if "/" in symbol:
        whole, part = (sizes.get(name) for name in symbol.split("/"))
        return whole is None or part is None or size == -(-whole // part)
    return sizes.setdefault(symbol, size) == size


def _symbols(wanted: str) -> list[str]:
    return wanted.replace("/", " ").replace("?", " ").split()
