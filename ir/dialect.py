"""The ops of the `qcompiler` domain, each with its reference body in standard ONNX ops.

A dialect op *is* a model-local function: stock ONNX Runtime inlines the body, and a kernel
registered under the same name only makes it faster.  Bodies are written in the forms ORT fuses and
avoid the ones it gets wrong:

* uint8 activations with zero point 128: s8 x s8 MatMulInteger is 23-100 times slower in ORT;
* scales multiply one after the other: ORT fuses `Mul(a_scale, b_scale)` only for a scalar a_scale;
* a Slice after ReduceMax: ORT returns an empty batch unreduced, [0, K] instead of [0, 1];
* W4A8 widens its activations with Cast/Sub/Mul, because a DequantizeLinear there stops ORT from
  turning the weight's into MatMulNBits (weights would be dequantized at every run).

The same text gives the generic op (`{block_size}` becomes a reference to the attribute) and the
body of one region (it becomes that region's number).
"""

from __future__ import annotations

import dataclasses

import onnx.parser
import onnx_ir as ir

from qcompiler.ir.region import Region

__all__ = ["DOMAIN", "OPS", "VERSION", "DialectOp", "declare", "function_of", "region_function"]

DOMAIN = "qcompiler"
VERSION = 1

SMALLEST_MAGNITUDE = 1e-20
"""Floor of a token's largest magnitude: an all-zero token still needs a scale to divide by."""


@dataclasses.dataclass(frozen=True)
class DialectOp:
    """One op: its signature and, line by line, what it means.

    Attributes:
        name: Op type.
        inputs: Names in order; the types ORT must see are in `types`.
        outputs: Names in order.
        body: ONNX text lines; `{attribute}` marks where an attribute goes.
        attributes: Attribute names the op takes.
        types: Storage of each input and output that is not float32.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: str
    attributes: tuple[str, ...] = ()
    types: tuple[tuple[str, ir.DataType], ...] = ()

    def type_of(self, name: str) -> ir.DataType:
        """The data type of an input or output."""
        return dict(self.types).get(name, ir.DataType.FLOAT)


_SCALE_OF_TOKEN = """
    magnitude = Abs (x)
    last = Constant <value_ints = [-1]> ()
    reduced = ReduceMax <keepdims = 1> (magnitude, last)
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    largest = Slice (reduced, first, second, last)
    floor = Constant <value_float = 1e-20> ()
    bounded = Max (largest, floor)
    top = Constant <value_float = {top}> ()
    s = Div (bounded, top)
"""

_QUANTIZE = DialectOp(
    name="Quantize",
    inputs=("x",),
    outputs=("q", "s"),
    attributes=("block_size",),
    types=(("q", ir.DataType.UINT8),),
    body=_SCALE_OF_TOKEN.replace("{top}", "127.0")
    + """
    middle = Constant <value = uint8 {128}> ()
    shape = Shape (s)
    zero = Expand (middle, shape)
    q = QuantizeLinear <axis = -1, {block_size}> (x, s, zero)
""",
)

_QUANTIZE_FP8 = DialectOp(
    name="QuantizeFp8",
    inputs=("x",),
    outputs=("q", "s"),
    attributes=("block_size",),
    types=(("q", ir.DataType.FLOAT8E4M3FN),),
    body=_SCALE_OF_TOKEN.replace("{top}", "448.0")
    + """
    q = QuantizeLinear <axis = -1, {block_size}, output_dtype = 17> (x, s)
""",
)

_W8A8 = DialectOp(
    name="QMatMulW8A8",
    inputs=("q", "s", "w", "ws"),
    outputs=("y",),
    types=(("q", ir.DataType.UINT8), ("w", ir.DataType.INT8)),
    body="""
    middle = Constant <value = uint8 {128}> ()
    sum = MatMulInteger (q, w, middle)
    real = Cast <to = 1> (sum)
    by_token = Mul (real, s)
    y = Mul (by_token, ws)
""",
)

_W4A8 = DialectOp(
    name="QMatMulW4A8",
    inputs=("q", "s", "w", "ws"),
    outputs=("y",),
    attributes=("block_size",),
    types=(("q", ir.DataType.UINT8), ("w", ir.DataType.INT4)),
    body="""
    real = Cast <to = 1> (q)
    middle = Constant <value_float = 128.0> ()
    centred = Sub (real, middle)
    x = Mul (centred, s)
    wide = DequantizeLinear <axis = 0, {block_size}> (w, ws)
    y = MatMul (x, wide)
""",
)

_W4A16 = DialectOp(
    name="QMatMulW4A16",
    inputs=("x", "w", "ws"),
    outputs=("y",),
    attributes=("block_size",),
    types=(("w", ir.DataType.INT4),),
    body="""
    wide = DequantizeLinear <axis = 0, {block_size}> (w, ws)
    y = MatMul (x, wide)
""",
)

_FP8 = DialectOp(
    name="QMatMulFp8",
    inputs=("q", "s", "w", "ws"),
    outputs=("y",),
    types=(("q", ir.DataType.FLOAT8E4M3FN), ("w", ir.DataType.FLOAT8E4M3FN)),
    body="""
    x = Cast <to = 1> (q)
    wide = Cast <to = 1> (w)
    sum = MatMul (x, wide)
    by_token = Mul (sum, s)
    y = Mul (by_token, ws)
""",
)

_CONV = DialectOp(
    name="QConv",
    inputs=("x", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"),
    outputs=("y",),
    attributes=("dilations", "group", "pads", "strides"),
    types=(
        ("x", ir.DataType.UINT8),
        ("xz", ir.DataType.UINT8),
        ("w", ir.DataType.INT8),
        ("wz", ir.DataType.INT8),
        ("yz", ir.DataType.UINT8),
        ("b", ir.DataType.INT32),
        ("y", ir.DataType.UINT8),
    ),
    body="""
    y = QLinearConv <{dilations}, {group}, {pads}, {strides}> (x, xs, xz, w, ws, wz, ys, yz, b)
""",
)

OPS = {op.name: op for op in (_QUANTIZE, _QUANTIZE_FP8, _W8A8, _W4A8, _W4A16, _FP8, _CONV)}

_ATTRIBUTE_TYPE = {"block_size": "int", "group": "int"}


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
    return _parse(name, DOMAIN, op, op.inputs, ", ".join(op.outputs), body, opset)


def region_function(region: Region, domain: str, opset: int) -> ir.Function:
    """The function of one region: its anchor's body with its sizes, then its steps."""
    op = OPS[region.anchor]
    body = op.body.replace("{block_size}", f"block_size = {region.size('K')}")
    extras = tuple(f"extra{i}" for i in range(len(region.extras)))
    values = [op.outputs[0]]
    for step in region.steps:
        operands = (values[arg] if arg >= 0 else extras[-1 - arg] for arg in step.args)
        attributes = ", ".join(f"{key} = {_literal(value)}" for key, value in step.attributes)
        call = f"{step.op} <{attributes}>" if attributes else step.op
        values.append(f"step{len(values)}")
        body += f"    {values[-1]} = {call} ({', '.join(operands)})\n"
    outputs = ", ".join([values[-1], *op.outputs[1:]])
    return _parse(region.name, domain, op, op.inputs + extras, outputs, body, opset)


def _literal(value: float | str) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


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
