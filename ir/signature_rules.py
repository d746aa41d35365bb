"""What a dialect op's signature asks of the operands and results of its nodes.

Sizes bear names: one that two operands share is equal in both, and `block_size` is the attribute's.
Operands are known by their names in the function: a region may have more of them, and only some of
the outputs.  What is not known of an operand is not held against it.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qcompiler.ir import dialect
from qcompiler.ir.decisions import region_of

__all__ = ["signature_problems"]


def signature_problems(model: ir.Model) -> Iterator[tuple[str, str, str]]:
    """Rule, node and problem of every node of ours that does not fit its op's signature."""
    for node in model.graph.all_nodes():
        function = model.functions.get(node.op_identifier())
        if function is None or not dialect.is_ours(node.domain):
            continue
        op = dialect.OPS.get(node.op_type.split("_")[0])
        if op is None:
            yield "dialect-op", str(node.name), f"{node.op_type} is no op of the dialect"
            continue
        named = [
            *zip(function.inputs, node.inputs, strict=False),
            *zip(function.outputs, node.outputs, strict=False),
        ]
        operands = {str(formal.name): value for formal, value in named if value is not None}
        for name, value in operands.items():
            if value.dtype not in (None, op.type_of(name)):
                wanted = op.type_of(name).name
                problem = f"{name} is {value.dtype}, {op.name} needs {wanted}"
                yield "operand-dtype", str(node.name), problem
        for problem in _misfits(node, op, operands):
            yield "operand-shape", str(node.name), problem


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
            yield f"{name} has shape [{got}], {op.name} needs [{wanted}]{suffix}"


def _known_sizes(node: ir.Node) -> dict[str, int]:
    """Sizes that the node itself states: a region in its record, an op in its attributes."""
    region = region_of(node)
    if region is None:
        numbers = node.attributes.values()
        return {a.name: a.as_int() for a in numbers if a.type is ir.AttributeType.INT}
    sizes = dict(region.sizes)
    return sizes | ({"block_size": sizes["K"]} if "K" in sizes else {})


def _pairs(
    wanted: list[str], shape: list[int | ir.SymbolicDim]
) -> list[tuple[str, int | ir.SymbolicDim]] | None:
    """Each size beside its symbol; `*` stands for any number of sizes.  None if ranks differ."""
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
    return wanted.replace("/", " ").split()
