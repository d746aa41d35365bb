"""The elementwise steps of a region, on vectors of float32.

`ELEMENTWISE` is the whole list of what an epilogue can compute; a new op is one more row.  A row is
written against the vector operations of an instruction set, `v` (see `targets/x86/vector.py`), so
that every architecture shares the table; asking what it can do imports no tvm.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from qcompiler.ir.region import QUANTIZATION, Region, Step

__all__ = ["ELEMENTWISE", "apply_steps", "unsupported_epilogue"]

MAX_EXTRAS = 8
"""Operands beside the product's; QC_MAX_EXTRAS of the C code."""

Expr = Any
Vectors = Any
"""An object with vector operations: broadcast, maximum, minimum, Register, gelu_tail, sigmoid;
nearest and quotient where results may be integers."""


@dataclasses.dataclass(frozen=True)
class Elementwise:
    """An ONNX op: how many operands it takes, its vector form, and the attribute values known.

    `emit` takes the vector operations, the operands, and attributes by their ONNX names.
    """

    arity: int
    emit: Callable[..., Expr]
    choices: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


def _clip(v: Vectors, x: Expr, min: float = -math.inf, max: float = math.inf) -> Expr:
    # In this order a NaN stays: the second operand is taken if the comparison fails.
    return v.minimum(v.broadcast(float(max)), v.maximum(v.broadcast(float(min)), x))


def _hard_sigmoid(v: Vectors, x: Expr, alpha: float = 0.2, beta: float = 0.5) -> Expr:
    return _clip(v, x * v.broadcast(float(alpha)) + v.broadcast(float(beta)), 0.0, 1.0)


def _leaky_relu(v: Vectors, x: Expr, alpha: float = 0.01) -> Expr:
    zero = v.broadcast(0.0)
    return v.maximum(zero, x) + v.minimum(zero, x) * v.broadcast(float(alpha))


def _gelu(v: Vectors, x: Expr, approximate: str = "none") -> Expr:
    # In this order a NaN stays: the second operand is taken if the comparison fails.
    return v.maximum(v.broadcast(0.0), x) - v.gelu_tail(x, approximate)


def _quantize(v: Vectors, x: Expr, scale: Expr, zero: Expr) -> Expr:
    """The integer as a float, like all values between steps."""
    # No quotient of infinity is known; this one saturates too.  In this order a NaN stays one.
    bounded = v.minimum(scale * v.broadcast(512.0), x)
    return _clip(v, v.nearest(v.quotient(bounded, scale)) + zero, 0.0, 255.0)


ELEMENTWISE: dict[str, Elementwise] = {
    "Add": Elementwise(2, lambda v, a, b: a + b),
    "Sub": Elementwise(2, lambda v, a, b: a - b),
    "Mul": Elementwise(2, lambda v, a, b: a * b),
    "Div": Elementwise(2, lambda v, a, b: a / b),
    "Relu": Elementwise(1, lambda v, x: v.maximum(v.broadcast(0.0), x)),
    "LeakyRelu": Elementwise(1, _leaky_relu),
    "Clip": Elementwise(1, _clip),
    "Gelu": Elementwise(1, _gelu, {"approximate": ("none", "tanh")}),
    "HardSigmoid": Elementwise(1, _hard_sigmoid),
    "HardSwish": Elementwise(1, lambda v, x: x * _hard_sigmoid(v, x, 1 / 6, 0.5)),
    "Sigmoid": Elementwise(1, lambda v, x: v.sigmoid(x)),
    "QuantizeLinear": Elementwise(3, _quantize),
    "DequantizeLinear": Elementwise(3, lambda v, q, scale, zero: (q - zero) * scale),
    "Tanh": Elementwise(1, lambda v, x: v.broadcast(2.0) * v.sigmoid(x + x) - v.broadcast(1.0)),
}


def apply_steps(v: Vectors, region: Region, anchor: Expr, extras: Sequence[Expr]) -> Expr:
    """The region's result for the lanes whose anchor value and extra operands are given."""
    values = [v.Register("float32", anchor)]
    operands = [v.Register("float32", extra) for extra in extras]
    for step in region.steps:
        args = [values[arg].value if arg >= 0 else operands[-1 - arg].value for arg in step.args]
        result = ELEMENTWISE[step.op].emit(v, *args, **dict(step.attributes))
        # In a register of its own, because later steps may read it more than once.
        values.append(v.Register("float32", result))
    return values[-1].value


def unsupported_epilogue(region: Region) -> str | None:
    """Why the steps of a region cannot be computed, or None."""
    if len(region.extras) > MAX_EXTRAS:
        return f"{len(region.extras)} extra operands; at most {MAX_EXTRAS} are supported"
    for position, step in enumerate(region.steps):
        if not all(-len(region.extras) <= arg <= position for arg in step.args):
            return f"step {position} ({step.op}) reads values that do not exist: {step.args}"
        if reason := _unsupported_step(step) or _mistyped_step(region, step):
            return reason
    return None


def _mistyped_step(region: Region, step: Step) -> str | None:
    """Why `step` cannot read what its operands are, or None when it can."""
    for operand, arg in enumerate(step.args):
        is_stored = arg > 0 and region.steps[arg - 1].op == "QuantizeLinear"
        if is_stored != (step.op == "DequantizeLinear" and operand == 0):
            return f"{step.op} reads {'integers' if is_stored else 'floats'}"
        if step.op in QUANTIZATION and operand and not (arg < 0 and _is_channel(region, arg)):
            return f"{step.op} takes its scale and zero point from operands, one per channel"
    return None


def _is_channel(region: Region, arg: int) -> bool:
    return region.extras[-1 - arg] == "channel"


def _unsupported_step(step: Step) -> str | None:
    """Why `step` cannot be computed, or None when it can."""
    row = ELEMENTWISE.get(step.op)
    if row is None:
        return f"no vector form of {step.op}; known are {', '.join(ELEMENTWISE)}"
    if len(step.args) != row.arity:
        return f"{step.op} takes {row.arity} operands, not {len(step.args)}"
    known = _parameters(row.emit)[1 + row.arity :]
    for name, value in step.attributes:
        if name not in known:
            return f"{step.op} has no attribute {name}"
        if name in row.choices and value not in row.choices[name]:
            return f"{step.op} with {name}={value!r}; known are {', '.join(row.choices[name])}"
    return None


@functools.cache
def _parameters(emit: Callable[..., Expr]) -> tuple[str, ...]:
    return tuple(inspect.signature(emit).parameters)
