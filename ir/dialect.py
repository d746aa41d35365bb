"""The `qcompiler` domain: the functions that its ops are, and those of regions.

A dialect op *is* a model-local function: stock ONNX Runtime inlines the body, and a kernel
registered under the same name only makes it faster.  `dialect_ops.py` has the ops.
"""

from __future__ import annotations

import re

import onnx.parser
import onnx_ir as ir

from qcompiler.ir.dialect_ops import OPS, WINDOWS, DialectOp
from qcompiler.ir.dialect_quantize import SMALLEST_MAGNITUDE
from qcompiler.ir.graph import every_node
from qcompiler.ir.joined_regions import dilation_of_windows, pads_of_windows
from qcompiler.ir.region import HALF, QUANTIZATION, Region, Step

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
    "result_type",
    "type_results",
]

DOMAIN = "qcompiler"
VERSION = 1

_ATTRIBUTE_TYPE = {"block_size": "int", "epsilon": "float", "group": "int", "width": "int"}


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
    op, body = OPS[name], OPS[name].body + OPS[name].ending
    for attribute in op.attributes:
        kind = _ATTRIBUTE_TYPE.get(attribute, "ints")
        body = body.replace(f"{{{attribute}}}", f"{attribute}: {kind} = @{attribute}")
        body = body.replace(f"{{={attribute}}}", f": {kind} = @{attribute}")
    return _parse(name, DOMAIN, op, op.inputs, ", ".join(op.outputs), body, opset)


def region_function(region: Region, domain: str, opset: int) -> ir.Function:
    """The function of one region: its anchor's body with its sizes, then its steps."""
    op, sizes = OPS[region.anchor], dict(region.sizes)
    body = op.body_of(region.flags)
    if "windows" in body:
        body = body.replace(WINDOWS, _windows(region))
    extras = tuple(f"extra{i}" for i in range(len(region.extras)))
    values = [op.outputs[0]]
    for step in region.steps:
        operands = [values[arg] if arg >= 0 else extras[-1 - arg] for arg in step.args]
        values.append(f"step{len(values)}")
        body += _step(values[-1], step, operands, HALF in region.flags)
    if region.is_quantized:
        values.append("stored")
        body += f"    stored = Cast <to = {int(ir.DataType.UINT8)}> ({values[-2]})\n"
    named = region.outputs or op.outputs
    outputs = tuple(values[-1] if name == op.outputs[0] else name for name in named)
    names = {"y": values[-1], "smoothing": extras[-1] if extras else ""}
    body += re.sub(r"\b(y|smoothing)\b", lambda m: names[m[0]], op.ending_of(region.flags))
    if region.widths:
        outputs = tuple(f"y{i}" for i in range(len(region.widths)))
        body += f"    widths = Constant <value_ints = {list(region.widths)}> ()\n"
        body += f"    {', '.join(outputs)} = Split <axis = -1> ({values[-1]}, widths)\n"
    body = body.replace("{block_size}", f"block_size = {sizes.get('G', sizes.get('K'))}")
    body = body.replace("{=width}", f"= {sizes.get('N')}")
    for key, value in region.attributes:
        body = body.replace(f"{{{key}}}", f"{key} = {_literal(value)}")
        body = body.replace(f"{{={key}}}", f"= {_literal(value)}")
    function = _parse(region.name, domain, op, op.inputs + extras, ", ".join(outputs), body, opset)
    _remove_unused(function)
    return function


def _windows(region: Region) -> str:
    """The lines that make rows of R rows of x, of every Sth one and those after it."""
    taps, pads, dilation = region.size("R"), pads_of_windows(region), dilation_of_windows(region)
    lines = f"""
    axis = Constant <value_ints = [-2]> ()
    step = Constant <value_ints = [{region.size("S")}]> ()
"""
    rows = "padded" if any(pads) else "x"
    lines += _padded(*pads) if any(pads) else ""
    for tap in range(taps):
        end = (tap - taps + 1) * dilation or (1 << 63) - 1
        lines += f"    first_{tap} = Constant <value_ints = [{tap * dilation}]> ()\n"
        lines += f"    end_{tap} = Constant <value_ints = [{end}]> ()\n"
        lines += f"    tap_{tap} = Slice ({rows}, first_{tap}, end_{tap}, axis, step)\n"
    parts = ", ".join(f"tap_{tap}" for tap in range(taps))
    return f"{lines}    windows = Concat <axis = -1> ({parts})\n"


def _padded(before: int, behind: int) -> str:
    """The lines that put rows of zeros around x.

    A Pad of one axis would do, but ORT 1.32 moves a Transpose across it as if it were of all axes:
    between two of them it reads numbers that are not there.
    """
    lines = "    leading = Shape <end = -2> (x)\n    columns = Shape <start = -1> (x)\n"
    parts = ["x"]
    for name, rows, place in (("before", before, 0), ("behind", behind, 2)):
        if rows:
            lines += f"    {name}_rows = Constant <value_ints = [{rows}]> ()\n"
            lines += f"    {name}_shape = Concat <axis = 0> (leading, {name}_rows, columns)\n"
            lines += f"    {name} = ConstantOfShape ({name}_shape)\n"
            parts.insert(place, name)
    return f"{lines}    padded = Concat <axis = -2> ({', '.join(parts)})\n"


def _remove_unused(function: ir.Function) -> None:
    """Drop the lines of a body that lead to no output."""
    for node in reversed(list(function)):
        if not any(value.uses() or value in function.outputs for value in node.outputs):
            function.remove(node, safe=True)


def _step(result: str, step: Step, operands: list[str], half: bool) -> str:
    """The lines of one step."""
    if step.op == "Clip":
        return _clip(result, operands[0], dict(step.attributes), half)
    if step.op in QUANTIZATION:
        return _QUANTIZATION[step.op].format(result, *operands)
    attributes = ", ".join(f"{key} = {_literal(value)}" for key, value in step.attributes)
    call = f"{step.op} <{attributes}>" if attributes else step.op
    return f"    {result} = {call} ({', '.join(operands)})\n"


# With a scale per channel ORT's own ops take 100 and 5 times as long as with one, these 4 and 2.
_QUANTIZATION = {
    "QuantizeLinear": """
    {0}_quotient = Div ({1}, {2})
    {0}_nearest = Round ({0}_quotient)
    {0}_shifted = Add ({0}_nearest, {3})
    {0}_lowest = Constant <value_float = 0.0> ()
    {0}_highest = Constant <value_float = 255.0> ()
    {0} = Clip ({0}_shifted, {0}_lowest, {0}_highest)
""",
    "DequantizeLinear": """
    {0}_centred = Sub ({1}, {3})
    {0} = Mul ({0}_centred, {2})
""",
}


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


def _literal(value: float | str | tuple[int, ...]) -> str:
    if isinstance(value, tuple):
        return repr(list(value))
    return f'"{value}"' if isinstance(value, str) else repr(value)


def result_type(region: Region, name: str) -> ir.DataType:
    """The data type of that result of a region which its anchor calls `name`."""
    if region.is_quantized:
        return ir.DataType.UINT8
    return OPS[region.anchor].type_of(name, region.flags)


def type_results(node: ir.Node, op: str) -> None:
    """Give the results of a node, which does what `op` does, types where inference found none."""
    for value, name in zip(node.outputs, OPS[op].outputs, strict=True):
        if value.dtype is None:
            value.dtype = OPS[op].type_of(name)


def declare(model: ir.Model) -> None:
    """Give `model` the function of each dialect op it uses, and drop those it no longer does."""
    opset = model.graph.opset_imports[""]
    used = {node.op_type for node in every_node(model.graph) if node.domain == DOMAIN}
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
