"""What a kernel has to compute: one anchor op of the dialect and the elementwise steps after it.

A region holds no graph objects, so it can be hashed, compared, named and handed to a kernel
generator; the node that stands for it carries it as text (`ir/decisions.py`):

    y = Gelu(QMatMulW8A8(q, s, w, ws) + bias)
    Region("QMatMulW8A8", (("K", 384), ("N", 1536)), ("channel",),
           (Step("Add", (0, -1)), Step("Gelu", (1,))))

Products of one input that were merged are one region with several results:

    Region("QMatMulW8A8", (("K", 384), ("N", 1152)), ("channel",), (Step("Add", (0, -1)),),
           widths=(384, 384, 384))

Integers may be steps, and the result: Q(y) by constants is ("QuantizeLinear", (i, scale, zero)).

An anchor may have attributes, and a region may compute only some of its outputs:

    q, s = Quantize(LayerNormalization(x, gamma, beta))
    Region("LayerNorm", (("K", 384),), outputs=("q", "s"), attributes=(("epsilon", 1e-05),))
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from typing import Any, Literal

__all__ = ["HALF", "LETTERS", "QUANTIZATION", "ExtraKind", "Region", "Step"]

HALF = "f16"
"""The flag of a region whose floating operands and results are float16, see `dialect_ops.py`."""

QUANTIZATION = ("QuantizeLinear", "DequantizeLinear")
"""Steps that read, beside their value, a scale and a zero point, as floats, of each channel."""

ExtraKind = Literal["channel", "tensor", "repeated"]
"""How an extra operand meets the result: one value per output channel, the same shape, or that of
its last dimensions, two or more, for all that is before them."""

LETTERS: dict[ExtraKind, str] = {"channel": "C", "tensor": "T", "repeated": "R"}
"""How names of regions, and the table of a library, say it."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One elementwise op; its value is the next in the region's list of values.

    `args` index the values of the region: 0 is the anchor's result, i the result of step i - 1,
    and -1 - j is extra operand j.
    """

    op: str
    args: tuple[int, ...]
    attributes: tuple[tuple[str, int | float | str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Region:
    """An anchor op with its static sizes, and the epilogue applied to its result.

    The function made from a region takes the anchor's inputs, then one input per extra operand.
    `outputs` names those of the anchor that are computed, in its order; empty means all.
    `flags` are words that select a form of the anchor's body, see `ir/attention.py` and `HALF`.
    `widths` divides the columns of the result among several outputs; empty means one.
    """

    anchor: str
    sizes: tuple[tuple[str, int], ...]
    extras: tuple[ExtraKind, ...] = ()
    steps: tuple[Step, ...] = ()
    outputs: tuple[str, ...] = ()
    attributes: tuple[tuple[str, float | tuple[int, ...]], ...] = ()
    flags: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()

    def size(self, name: str) -> int:
        """The static size called `name` ("K", "N")."""
        return dict(self.sizes)[name]

    def number(self, name: str) -> float:
        """The attribute called `name`, a number ("epsilon")."""
        value = dict(self.attributes)[name]
        assert not isinstance(value, tuple)
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """The attribute called `name`, a list ("strides")."""
        value = dict(self.attributes)[name]
        assert isinstance(value, tuple)
        return value

    @property
    def is_quantized(self) -> bool:
        """Whether its results are uint8: its last step is QuantizeLinear."""
        return bool(self.steps) and self.steps[-1].op == "QuantizeLinear"

    @property
    def name(self) -> str:
        """A C identifier, equal only for equal regions: "QMatMulW8A8_K384_N1536_AddC_Gelu"."""
        parts = [self.anchor, *(f"{name}{size}" for name, size in self.sizes), *self.flags]
        for step in self.steps:
            letters = (LETTERS[self.extras[-1 - arg]] for arg in step.args if arg < 0)
            parts.append(step.op + "".join(letters))
        parts += ["x".join(map(str, self.widths))] if self.widths else []
        parts += ["".join(self.outputs)] if self.outputs else []
        plain = not self.attributes and all(not step.attributes for step in self.steps)
        if not plain or not self.is_chain():
            parts.append(hashlib.sha256(repr(self).encode()).hexdigest()[:6])
        return "_".join(parts)

    def to_json(self) -> str:
        """A text that `from_json` reads back."""
        return _to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Region:
        """The region of a text made by `to_json`."""
        return _from_json(text)

    def is_chain(self) -> bool:
        """Whether each step reads the value before it, then the next unread extra operands."""
        unread = 0
        for position, step in enumerate(self.steps):
            expected = [position]
            while len(expected) < len(step.args):
                unread += 1
                expected.append(-unread)
            if list(step.args) != expected:
                return False
        return unread == len(self.extras)


@functools.lru_cache(4096)  # thousands of nodes have a few regions among them
def _to_json(region: Region) -> str:
    return json.dumps(dataclasses.asdict(region))


@functools.lru_cache(4096)
def _from_json(text: str) -> Region:
    written = json.loads(text)
    content = {key: _as_tuple(value) for key, value in written.items()}
    content["steps"] = tuple(
        Step(**{key: _as_tuple(value) for key, value in step.items()}) for step in written["steps"]
    )
    return Region(**content)


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value
