"""The ops of the dialect on rows of floats: norms, which quantize their result, and attention."""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.ir.attention import attention_body
from qcompiler.ir.dialect_op import DialectOp
from qcompiler.ir.dialect_quantize import TOKEN_TO_FP8, TOKEN_TO_INT8

__all__ = ["ATTENTION_OPS", "NORM_OPS"]

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


def _norm(name: str, body: str, parameters: tuple[str, ...]) -> DialectOp:
    """A norm of `x`, or of `x = a + b`, and the `Quantize` of its result.

    With the flag "smoothed" what is quantized is the product with one extra operand per channel.
    """
    residual, is_fp8 = name.startswith("Add"), name.endswith("Fp8")
    quantized = TOKEN_TO_FP8 if is_fp8 else TOKEN_TO_INT8
    body = ("    x = Sum (a, b)" if residual else "") + body
    smoothed = f"{body}    z = Mul (y, extra0)\n" + quantized.replace("{x}", "z")
    plain = body + quantized.replace("{x}", "y")
    return DialectOp(
        name=name,
        inputs=(*(("a", "b") if residual else ("x",)), *parameters),
        outputs=(*(("x",) if residual else ()), "y", "q", "s"),
        attributes=("epsilon", "block_size"),
        types=(("q", ir.DataType.FLOAT8E4M3FN if is_fp8 else ir.DataType.UINT8),),
        shapes=(
            *((name, "* block_size") for name in ("x", "y", "q")),
            *((name, "block_size") for name in parameters),
            ("s", "* 1"),
        ),
        stage="kernel",
        wide=("s",),
        body=plain,
        form=lambda flags: smoothed if "smoothed" in flags else plain,
    )


NORM_OPS = tuple(
    _norm(f"{residual}{name}{kind}", body, parameters)
    for kind in ("", "Fp8")
    for name, body, parameters in (
        ("LayerNorm", _LAYER_NORM, ("gamma", "beta")),
        ("RMSNorm", _RMS_NORM, ("gamma",)),
    )
    for residual in ("", "Add")
)

_ATTENTION = DialectOp(
    name="Attention",
    inputs=("q", "k", "v", "scale"),
    outputs=("y",),
    stage="kernel",
    wide=("scale",),
    body=attention_body((), masked=False),
    form=lambda flags: attention_body(flags, masked=False),
)

_MASKED_ATTENTION = DialectOp(
    name="MaskedAttention",
    inputs=("q", "k", "v", "scale", "mask"),
    outputs=("y",),
    stage="kernel",
    wide=("scale",),
    body=attention_body((), masked=True),
    form=lambda flags: attention_body(flags, masked=True),
)

ATTENTION_OPS = (_ATTENTION, _MASKED_ATTENTION)
