"""One op of the `qcompiler` domain: its signature and its body in standard ops."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Literal

import onnx_ir as ir

from qcompiler.ir.region import HALF

__all__ = ["DialectOp"]


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
        wide: Floats that stay float32 in a region with the flag `HALF`: scales.
        ending: More of the body, behind the steps of a region, on whose result it calls y.
        smoothed_ending: The same of a region with the flag "smoothed", whose last extra operand
            it calls smoothing.
        follows: Whether the body is the same in float16, so that the op itself may be given it.
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
    wide: tuple[str, ...] = ()
    ending: str = ""
    smoothed_ending: str = ""
    follows: bool = False

    def type_of(self, name: str, flags: Sequence[str] = ()) -> ir.DataType:
        """The data type of an input or output, in a region with these flags."""
        half = HALF in flags and name not in self.wide
        return dict(self.types).get(name, ir.DataType.FLOAT16 if half else ir.DataType.FLOAT)

    def ending_of(self, flags: tuple[str, ...]) -> str:
        """The ending of a region with these flags."""
        return self.smoothed_ending if "smoothed" in flags else self.ending

    def body_of(self, flags: tuple[str, ...]) -> str:
        """The body of a region with these flags."""
        body = self.body if self.form is None else self.form(flags)
        return body if HALF not in flags or self.follows else _in_half(self, body)


def _in_half(op: DialectOp, body: str) -> str:
    """The lines of a body whose operands and results are float16, and nothing in between.

    What is computed from a result is computed from it as it was rounded.
    """
    for name in dict.fromkeys((*op.inputs, *op.outputs, "extra0")):
        floats = op.type_of(name, (HALF,)) is ir.DataType.FLOAT16
        if not floats or not re.search(rf"\b{name}\b", body):
            continue
        body = re.sub(rf"\b{name}\b", f"{name}_wide", body)
        made = re.search(rf"^ *{name}_wide = .*\n", body, re.MULTILINE)
        if made is None:
            body = f"\n    {name}_wide = Cast <to = 1> ({name})\n{body}"
        else:
            exact = made.group().replace(f"{name}_wide =", f"{name}_exact =")
            rounded = f"    {name} = Cast <to = 10> ({name}_exact)\n"
            rounded += f"    {name}_wide = Cast <to = 1> ({name})\n"
            body = body.replace(made.group(), exact + rounded)
    return body
