"""The elementwise steps of a region, on vectors of 16 float32 lanes.

`ELEMENTWISE` is the whole list of what an epilogue can compute; a new op is one more row.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence

from qcompiler.ir.region import Region, Step
from qcompiler.targets import tir
from qcompiler.targets.tir import Expr, Register
from qcompiler.targets.x86.vector import absolute, erfc_positive, sigmoid

__all__ = ["ELEMENTWISE", "apply_steps", "unsupported_step"]


@dataclasses.dataclass(frozen=True)
class Elementwise:
    """An ONNX op: how many operands it takes, its vector form, and the attribute values known.

    Attributes are passed to `emit` by their ONNX names.
    """

    arity: int
    emit: Callable[..., Expr]
    choices: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


def _clip(x: Expr, min: float = -math.inf, max: float = math.inf) -> Expr:
    return tir.minimum(tir.maximum(x, tir.broadcast(float(min))), tir.broadcast(float(max)))


def _gelu(x: Expr, approximate: str = "none") -> Expr:
    if approximate == "tanh":
        # x (1 + tanh(u)) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        scale = 2 * math.sqrt(2 / math.pi)
        cubic = x * x * tir.broadcast(0.044715 * scale) + tir.broadcast(scale)
        return x * sigmoid(x * cubic)
    # x Phi(x) = max(x, 0) - |x| / 2 erfc(|x| / sqrt(2)), without cancellation for x < 0
    magnitude = Register("float32", absolute(x))
    tail = erfc_positive(magnitude.value * tir.broadcast(math.sqrt(0.5)))
    return tir.maximum(x, tir.broadcast(0.0)) - magnitude.value * tir.broadcast(0.5) * tail


ELEMENTWISE: dict[str, Elementwise] = {
    "Add": Elementwise(2, lambda a, b: a + b),
    "Sub": Elementwise(2, lambda a, b: a - b),
    "Mul": Elementwise(2, lambda a, b: a * b),
    "Relu": Elementwise(1, lambda x: tir.maximum(x, tir.broadcast(0.0))),
    "Clip": Elementwise(1, _clip),
    "Gelu": Elementwise(1, _gelu, {"approximate": ("none", "tanh")}),
    "Sigmoid": Elementwise(1, sigmoid),
    "Tanh": Elementwise(1, lambda x: tir.broadcast(2.0) * sigmoid(x + x) - tir.broadcast(1.0)),
}


def apply_steps(region: Region, anchor: Expr, extras: Sequence[Expr]) -> Expr:
    """The region's result for the lanes whose anchor value and extra operands are given."""
    values = [Register("float32", anchor)]
    operands = [Register("float32", extra) for extra in extras]
    for step in region.steps:
        args = [values[arg].value if arg >= 0 else operands[-1 - arg].value for arg in step.args]
        # In a register of its own, because later steps may read it more than once.
        values.append(
            Register("float32", ELEMENTWISE[step.op].emit(*args, **dict(step.attributes)))
        )
    return values[-1].value


def unsupported_step(step: Step) -> str | None:
    """Why `step` cannot be computed, or None when it can."""
    row = ELEMENTWISE.get(step.op)
    if row is None:
        return f"no vector form of {step.op}; known are {', '.join(ELEMENTWISE)}"
    if len(step.args) != row.arity:
        return f"{step.op} takes {row.arity} operands, not {len(step.args)}"
    known = list(inspect.signature(row.emit).parameters)[row.arity :]
    for name, value in step.attributes:
        if name not in known:
            return f"{step.op} has no attribute {name}"
        if name in row.choices and value not in row.choices[name]:
            return f"{step.op} with {name}={value!r}; known are {', '.join(row.choices[name])}"
    return None
