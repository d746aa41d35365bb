"""The ops of the `qcompiler` domain, each with its reference body in standard ONNX ops.

A dialect op *is* a model-local function: stock ONNX Runtime inlines the body, and a kernel
registered under the same name only makes it faster.  Bodies are written in the forms ORT fuses and
avoid the ones it gets wrong:

* uint8 activations with zero point 128: s8 x s8 MatMulInteger is 23-100 times slower in ORT;
* weights as uint8, too, 128 above what is stored (Cast wraps, BitwiseXor flips the top bit): sums
  of u8 x s8 saturate in ORT on x86 without VNNI.  ORT folds both ops when a session is made, and
  fuses the product as it would without them;
* scales multiply one after the other: ORT fuses `Mul(a_scale, b_scale)` only for a scalar a_scale,
  and of that, after DynamicQuantizeLinear, it makes one DynamicQuantizeMatMul (QMatMulU8S8);
* a Slice after ReduceMax: ORT returns an empty batch unreduced, [0, K] instead of [0, 1];
* Sum, not Add, before a LayerNormalization: ORT makes SkipLayerNormalization of that pair, which is
  8 times slower;
* RMSNorm in the one spelling that ORT makes SimplifiedLayerNormalization of;
* W4A8 widens its activations with Cast/Sub/Mul, because a DequantizeLinear there stops ORT from
  turning the weight's into MatMulNBits (weights would be dequantized at every run).

The same text gives the generic op (`{block_size}` becomes a reference to the attribute) and the
body of one region (it becomes that region's number); `{=epsilon}` where the body's op calls the
attribute something else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import onnx.parser
import onnx_ir as ir

from qcompiler.ir.attention import attention_body
from qcompiler.ir.region import Region

__all__ = [
    "DOMAIN",
    "OPS",
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

SMALLEST_MAGNITUDE = 1e-20
"""Floor of a token's largest magnitude: an all-zero token still needs a scale to divide by."""


@dataclasses.dataclass(frozen=True)
class DialectOp:
    """One op: its signature and, line by line, what it means.

    Attributes:
        name: Op type.
        inputs: Names in order; the types ORT must see are in `types`.
        outputs: Names in order.
        body: ONNX text lines; `{attribute}` marks where an attribute goes, see above.
        attributes: Attribute names the op takes.
        types: Storage of each input and output that is not float32.
        shapes: Sizes of inputs and outputs by name, `*` for any number of them: "* K", "K N",
            "K/block_size N" (rounded up), "N?" for a list of N or one number for all of them.
            Equal names are equal sizes.
        stage: The first in which it may appear; "kernel" ones are regions only.
        form: The body of a region with these flags, if flags select one.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: str
    attributes: tuple[str, ...] = ()
    types: tuple[tuple[str, ir.DataType], ...] = ()
    shapes: tuple[tuple[str, str], ...] = ()
    stage: Literal["quantized", "kernel"] = "quantized"
    form: Callable[[tuple[str, ...]], str] | None = None

    def type_of(self, name: str) -> ir.DataType:
        """The data type of an input or output."""
        return dict(self.types).get(name, ir.DataType.FLOAT)


_SCALE_OF_TOKEN = """
    magnitude = Abs ({x})
    last = Constant <value_ints = [-1]> ()
    reduced = ReduceMax <keepdims = 1> (magnitude, last)
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    largest = Slice (reduced, first, second, last)
    floor = Constant <value_float = {floor}> ()
    bounded = Max (largest, floor)
    top = Constant <value_float = {top}> ()
    s = Div (bounded, top)
""".replace("{floor}", str(SMALLEST_MAGNITUDE))

_TOKEN_TO_INT8 = (
    _SCALE_OF_TOKEN.replace("{top}", "127.0")
    + """
    middle = Constant <value = uint8 {128}> ()
    shape = Shape (s)
    zero = Expand (middle, shape)
    q = QuantizeLinear <axis = -1, {block_size}> ({x}, s, zero)
"""
)

_SHIFTED = """
    middle = Constant <value = uint8 {128}> ()
    bytes = Cast <to = 2> (w)
    shifted = BitwiseXor (bytes, middle)
"""

_TOKENS = (("x", "* block_size"), ("q", "* block_size"), ("s", "* 1"))
_ROWS = (("q", "* K"), ("s", "* 1"))
_MATRIX = (("w", "K N"), ("ws", "N"), ("y", "* N"))
_ONE_ROW = (("q", "* K"), ("s", "1?"), ("z", "1?"))
_GROUPS = (("w", "K N"), ("ws", "K/block_size N"), ("y", "* N"))

_QUANTIZE = DialectOp(
    name="Quantize",
    inputs=("x",),
    outputs=("q", "s"),
    attributes=("block_size",),
    types=(("q", ir.DataType.UINT8),),
    shapes=_TOKENS,
    body=_TOKEN_TO_INT8.replace("{x}", "x"),
)

_QUANTIZE_FP8 = DialectOp(
    name="QuantizeFp8",
    inputs=("x",),
    outputs=("q", "s"),
    attributes=("block_size",),
    types=(("q", ir.DataType.FLOAT8E4M3FN),),
    shapes=_TOKENS,
    body=_SCALE_OF_TOKEN.replace("{top}", "448.0").replace("{x}", "x")
    + """
    q = QuantizeLinear <axis = -1, {block_size}, output_dtype = 17> (x, s)
""",
)

_W8A8 = DialectOp(
    name="QMatMulW8A8",
    inputs=("q", "s", "w", "ws"),
    outputs=("y",),
    types=(("q", ir.DataType.UINT8), ("w", ir.DataType.INT8)),
    shapes=(*_ROWS, *_MATRIX),
    body=_SHIFTED
    + """
    sum = MatMulInteger (q, shifted, middle, middle)
    real = Cast <to = 1> (sum)
    by_token = Mul (real, s)
    y = Mul (by_token, ws)
""",
)

_SUMS_OF_ONE_SCALE = """
    sum = MatMulInteger (q, {weight})
    real = Cast <to = 1> (sum)
    scale = Mul (s, ws)
    y = Mul (real, scale)
"""

_U8S8 = DialectOp(
    name="QMatMulU8S8",
    inputs=("q", "s", "z", "w", "ws"),
    outputs=("y",),
    types=(("q", ir.DataType.UINT8), ("z", ir.DataType.UINT8), ("w", ir.DataType.INT8)),
    shapes=(*_ONE_ROW, *_MATRIX),
    body=_SHIFTED + _SUMS_OF_ONE_SCALE.replace("{weight}", "shifted, z, middle"),
)

_U8U8 = DialectOp(
    name="QMatMulU8U8",
    inputs=("q", "s", "z", "w", "ws", "wz"),
    outputs=("y",),
    types=tuple((name, ir.DataType.UINT8) for name in ("q", "z", "w", "wz")),
    shapes=(*_ONE_ROW, *_MATRIX, ("wz", "N")),
    body=_SUMS_OF_ONE_SCALE.replace("{weight}", "w, z, wz"),
)

_W8A8_DYNAMIC = DialectOp(
    name="DynamicQMatMulW8A8",
    inputs=("x", "w", "ws"),
    outputs=("y",),
    attributes=("block_size",),
    types=(("w", ir.DataType.INT8),),
    shapes=(("x", "* block_size"), ("w", "block_size N"), *_MATRIX[1:]),
    stage="kernel",
    body=_QUANTIZE.body + _W8A8.body.replace("middle", "zero_point"),
)

_W4A8 = DialectOp(
    name="QMatMulW4A8",
    inputs=("q", "s", "w", "ws"),
    outputs=("y",),
    attributes=("block_size",),
    types=(("q", ir.DataType.UINT8), ("w", ir.DataType.INT4)),
    shapes=(*_ROWS, *_GROUPS),
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
    shapes=(("x", "* K"), *_GROUPS),
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
    shapes=(*_ROWS, *_MATRIX),
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
    shapes=(
        ("x", "B C *"),
        ("w", "M C/group *"),
        *((name, "1?") for name in ("xs", "xz", "ys", "yz")),
        *((name, "M?") for name in ("ws", "wz")),
        ("b", "M"),
        ("y", "B M *"),
    ),
    body="""
    y = QLinearConv <{dilations}, {group}, {pads}, {strides}> (x, xs, xz, w, ws, wz, ys, yz, b)
""",
)

_LAYER_NORM = """
    y = LayerNormalization <axis = -1, {epsilon}> (x, gamma, beta)
"""

_RMS_NORM = """
    two = Constant <value_float = 2.0> ()
    squares = Pow (x, two)
    axes = Constant <value_ints = [-1]> ()
    mean = ReduceMean <keepdims = 1> (squares, axes)
    epsilon = Constant <value_float {=epsilon}> ()
    above_zero = Add (mean, epsilon)
    root = Sqrt (above_zero)
    unit = Div (x, root)
    y = Mul (unit, gamma)
"""


def _norm(name: str, body: str, parameters: tuple[str, ...], residual: bool) -> DialectOp:
    """A norm of `x`, or of `x = a + b`, and the `Quantize` of its result.

    With the flag "smoothed" what is quantized is the product with one extra operand per channel.
    """
    body = ("    x = Sum (a, b)" if residual else "") + body
    smoothed = f"{body}    z = Mul (y, extra0)\n" + _TOKEN_TO_INT8.replace("{x}", "z")
    plain = body + _TOKEN_TO_INT8.replace("{x}", "y")
    return DialectOp(
        name=name,
        inputs=(*(("a", "b") if residual else ("x",)), *parameters),
        outputs=(*(("x",) if residual else ()), "y", "q", "s"),
        attributes=("epsilon", "block_size"),
        types=(("q", ir.DataType.UINT8),),
        shapes=(
            *((name, "* block_size") for name in ("x", "y", "q")),
            *((name, "block_size") for name in parameters),
            ("s", "* 1"),
        ),
        stage="kernel",
        body=plain,
        form=lambda flags: smoothed if "smoothed" in flags else plain,
    )


_NORMS = (
    _norm("LayerNorm", _LAYER_NORM, ("gamma", "beta"), residual=False),
    _norm("AddLayerNorm", _LAYER_NORM, ("gamma", "beta"), residual=True),
    _norm("RMSNorm", _RMS_NORM, ("gamma",), residual=False),
    _norm("AddRMSNorm", _RMS_NORM, ("gamma",), residual=True),
)

_ATTENTION = DialectOp(
    name="Attention",
    inputs=("q", "k", "v", "scale"),
    outputs=("y",),
    stage="kernel",
    body=attention_body((), masked=False),
    form=lambda flags: attention_body(flags, masked=False),
)

_MASKED_ATTENTION = DialectOp(
    name="MaskedAttention",
    inputs=("q", "k", "v", "scale", "mask"),
    outputs=("y",),
    stage="kernel",
    body=attention_body((), masked=True),
    form=lambda flags: attention_body(flags, masked=True),
)

_MATMULS = (_W8A8, _U8S8, _U8U8, _W8A8_DYNAMIC, _W4A8, _W4A16, _FP8)
_ATTENTIONS = (_ATTENTION, _MASKED_ATTENTION)

OPS = {op.name: op for op in (_QUANTIZE, _QUANTIZE_FP8, *_MATMULS, _CONV, *_NORMS, *_ATTENTIONS)}

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
    op = OPS[region.anchor]
    sizes = dict(region.sizes)
    body = op.form(region.flags) if op.form is not None else op.body
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
            body += _clip(values[-1], next(operands), dict(step.attributes))
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


def _clip(result: str, operand: str, bounds: dict[str, int | float | str]) -> str:
    """Clip takes its bounds as inputs: lines that make them."""
    lines, names = "", [operand, "", ""]
    for index, bound in enumerate(("min", "max")):
        if bound in bounds:
            names[1 + index] = f"{result}_{bound}"
            lines += f"    {names[1 + index]} = Constant <value_float = {bounds[bound]}> ()\n"
    return lines + f"    {result} = Clip ({', '.join(names).rstrip(', ')})\n"


def _literal(value: float | str) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def type_results(node: ir.Node, op: str, outputs: Sequence[str] = ()) -> None:
    """Give the results of a node their types where shape inference found none.

    Args:
        node: In place, computing what `op` does.
        op: Name of a dialect op.
        outputs: Which of the op's outputs the node has; all by default.
    """
    for value, name in zip(node.outputs, outputs or OPS[op].outputs, strict=True):
        if value.dtype is None:
            value.dtype = OPS[op].type_of(name)


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
