"""The `qcompiler` domain: the functions that its ops are, and those of regions.

A dialect op *is* a model-local function: stock ONNX Runtime inlines the body, and a kernel
registered under the same name only makes it faster.  `dialect_ops.py` has the ops.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx.parser
import onnx_ir as ir

from qcompiler.ir.dialect_ops import OPS, SMALLEST_MAGNITUDE, DialectOp
from qcompiler.ir.region import HALF, Region

__all__ = [
    "DOMAIN",
    "OPS",
    "SMALLEST_MAGNITUDE",
    "VERSION",
    "DialectOp",
    "declare",
    "function_of",
    "is_ours",
    "region_function",
    "type_results",
]

DOMAIN = "qcompiler"
VERSION = 1

_ATTRIBUTE_TYPE = {"block_size": "int", "epsilon": "float", "group": "int"}


def is_ours(domain: str) -> bool:
    """Whether the ops of a domain are the dialect's, or outlined regions of them."""
    return domain == DOMAIN or domain.startswith(f"{DOMAIN}.")


def _parse(
    name: str,
    domain: str,
    op: DialectOp,
    inputs: tuple[str, ...],
    output_names: str,
    body: str,
    opset: int,
) -> ir.Function:
    attributes = f" <{', '.join(op.attributes)}>" if "@" in body else ""
    text = (
        f'<domain: "{domain}", opset_import: ["" : {opset}]>\n'
        f"{name}{attributes} ({', '.join(inputs)}) => ({output_names})\n{{{body}}}"
    )
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))


def function_of(name: str, opset: int) -> ir.Function:
    """The generic function of a dialect op, for a model of the given opset."""
    op, body = OPS[name], OPS[name].body
    for attribute in op.attributes:
        kind = _ATTRIBUTE_TYPE.get(attribute, "ints")
        body = body.replace(f"{{{attribute}}}", f"{attribute}: {kind} = @{attribute}")
        body = body.replace(f"{{={attribute}}}", f": {kind} = @{attribute}")
    return _parse(name, DOMAIN, op, op.inputs, ", ".join(op.outputs), body, opset)


def region_function(region: Region, domain: str, opset: int) -> ir.Function:
    """The function of one region: its anchor's body with its sizes, then its steps."""
    op, sizes = OPS[region.anchor], dict(region.sizes)
    body = op.body_of(region.flags)
    body = body.replace("{block_size}", f"block_size = {sizes.get('G', sizes.get('K'))}")
    for key, value in region.attributes:
        body = body.replace(f"{{{key}}}", f"{key} = {_literal(value)}")
        body = body.replace(f"{{={key}}}", f"= {_literal(value)}")
    extras = tuple(f"extra{i}" for i in range(len(region.extras)))
    values = [op.outputs[0]]
    for step in region.steps:
        operands = (values[arg] if arg >= 0 else extras[-1 - arg] for arg in step.args)
        attributes = ", ".join(f"{key} = {_literal(value)}" for key, value in step.attributes)
        values.append(f"step{len(values)}")
        if step.op == "Clip":
            half = HALF in region.flags
            body += _clip(values[-1], next(operands), dict(step.attributes), half)
            continue
        call = f"{step.op} <{attributes}>" if attributes else step.op
        body += f"    {values[-1]} = {call} ({', '.join(operands)})\n"
    outputs = region.outputs or (values[-1], *op.outputs[1:])
    if region.widths:
        outputs = tuple(f"y{i}" for i in range(len(region.widths)))
        body += f"    widths = Constant <value_ints = {list(region.widths)}> ()\n"
        body += f"    {', '.join(outputs)} = Split <axis = -1> ({values[-1]}, widths)\n"
    function = _parse(region.name, domain, op, op.inputs + extras, ", ".join(outputs), body, opset)
    _remove_unused(function)
    return function


def _remove_unused(function: ir.Function) -> None:
    """Drop the lines of a body that lead to no output."""
    for node in reversed(list(function)):
        if not any(value.uses() or value in function.outputs for value in node.outputs):
            function.remove(node, safe=True)


def _clip(result: str, operand: str, bounds: dict[str, int | float | str], half: bool) -> str:
    """Clip takes its bounds as inputs: lines that make them."""
    lines, names = "", [operand, "", ""]
    for index, bound in enumerate(("min", "max")):
        if bound in bounds:
            name = names[1 + index] = f"{result}_{bound}"
            wide = f"{name}_wide" if half else name
            lines += f"    {wide} = Constant <value_float = {bounds[bound]}> ()\n"
            lines += f"    {name} = Cast <to = 10> ({wide})\n" if half else ""
    return lines + f"    {result} = Clip ({', '.join(names).rstrip(', ')})\n"


def _literal(value: float | str) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def type_results(
    node: ir.Node, op: str, outputs: Sequence[str] = (), flags: Sequence[str] = ()
) -> None:
    """Give the results of a node their types where shape inference found none.

    Args:
        node: In place, computing what `op` does.
        op: Name of a dialect op.
        outputs: Which of the op's outputs the node has; all by default.
        flags: Of its region, if it is one.
    """
    for value, name in zip(node.outputs, outputs or OPS[op].outputs, strict=True):
        if value.dtype is None:
            value.dtype = OPS[op].type_of(name, flags)


def declare(model: ir.Model) -> None:
    """Give `model` the function of each dialect op it uses, and drop those it no longer does."""
    opset = model.graph.opset_imports[""]
    used = {node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN}
    for identifier in [key for key in model.functions if key[0] == DOMAIN]:
        if identifier[1] not in used:
            del model.functions[identifier]
    for name in sorted(used):
        function = function_of(name, opset)
        model.functions[function.identifier()] = function
    if used:
        model.graph.opset_imports[DOMAIN] = VERSION
    else:
        model.graph.opset_imports.pop(DOMAIN, None)
