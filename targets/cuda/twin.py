"""The epilogue of a region as a C function, for its twin on the CPU (`native/twins.c`).

y = Gelu(anchor + extras[0])  =>  static float epilogue_<region>(float anchor, const float *extras)
"""

from __future__ import annotations

import math

from qcompiler.ir.region import Region
from qcompiler.targets.epilogue import apply_steps

__all__ = ["epilogue_function", "epilogue_name"]


class _Text:
    """A C expression of type float."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __add__(self, other: _Text) -> _Text:
        return _Text(f"({self.text} + {other.text})")

    def __sub__(self, other: _Text) -> _Text:
        return _Text(f"({self.text} - {other.text})")

    def __mul__(self, other: _Text) -> _Text:
        return _Text(f"({self.text} * {other.text})")

    def __truediv__(self, other: _Text) -> _Text:
        return _Text(f"({self.text} / {other.text})")


class _Register:
    """A local variable: later steps may read it more than once."""

    def __init__(self, floats: _Floats, value: _Text) -> None:
        self.value = floats.name(value)


class _Floats:
    """What `epilogue.ELEMENTWISE` is written against: here a float, and statements that make it."""

    def __init__(self) -> None:
        self.statements: list[str] = []

    def Register(self, dtype: str, value: _Text) -> _Register:  # noqa: N802 (the table's name)
        return _Register(self, value)

    def name(self, value: _Text) -> _Text:
        result = f"t{len(self.statements)}"
        self.statements.append(f"    const float {result} = {value.text};")
        return _Text(result)

    @staticmethod
    def broadcast(value: float) -> _Text:
        if math.isinf(value):
            return _Text("INFINITY" if value > 0 else "-INFINITY")
        return _Text(f"{value!r}f")

    @staticmethod
    def maximum(a: _Text, b: _Text) -> _Text:
        return _Text(f"({a.text} > {b.text} ? {a.text} : {b.text})")

    @staticmethod
    def minimum(a: _Text, b: _Text) -> _Text:
        return _Text(f"({a.text} < {b.text} ? {a.text} : {b.text})")

    @staticmethod
    def absolute(value: _Text) -> _Text:
        return _Text(f"fabsf({value.text})")

    @staticmethod
    def sigmoid(value: _Text) -> _Text:
        return _Text(f"(1.0f / (1.0f + expf(-{value.text})))")

    def gelu_tail(self, value: _Text, approximate: str) -> _Text:
        """max(x, 0) - GELU(x)."""
        # Infinity times the 0 of its tail would be NaN.
        x = self.name(self.minimum(self.broadcast(1e4), self.absolute(value)))
        if approximate == "tanh":
            scale = -2 * math.sqrt(2 / math.pi)
            cubic = x * x * self.broadcast(0.044715 * scale) + self.broadcast(scale)
            return x * self.sigmoid(x * cubic)
        return _Text(f"({x.text} * 0.5f * erfcf({x.text} * {math.sqrt(0.5)!r}f))")


def epilogue_name(region: Region) -> str | None:
    """The C name of the function; None for a region without steps."""
    return f"epilogue_{region.name}" if region.steps else None


def epilogue_function(region: Region) -> str:
    """The C text of the function."""
    floats = _Floats()
    extras = [_Text(f"extras[{i}]") for i in range(len(region.extras))]
    result = apply_steps(floats, region, _Text("anchor"), extras)
    lines = [
        f"static float {epilogue_name(region)}(float anchor, const float *extras) {{",
        "    (void)extras;",
        *floats.statements,
        f"    return {result.text};",
        "}",
    ]
    return "\n".join(lines)
