"""The kinds of products: how each makes operands of `mma.sync` of what it loads.

A *fragment* is what one lane holds of the 16-row operand, four registers.  Everything else about
the kernels (`stream.py`, `tile.py`) is the same for all kinds, because it is about bytes: one mma
takes 32 bytes of an activation's row, and 16 bytes of packed weights per lane are a tile.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence

from qcompiler.targets.cuda.device import Expr, constant, emit, registers, store, unrolled

__all__ = ["PRODUCTS", "Product"]

STEPS = 4
"""Of 32 bytes, in a chunk of K."""


@dataclasses.dataclass(frozen=True)
class Product(ABC):
    """A kind of product.

    Attributes:
        activation: The name of the operand that is not weights.
        tiles: Weight tiles of 16 columns in a chunk.
        mma: The instruction.
        register: The type of an accumulator.
        nothing: A word of activations that counts as zeros.
    """

    activation: str
    tiles: int
    mma: str
    register: str = "float32"
    nothing: int = 0

    @abstractmethod
    def fragment(self, words: Sequence[Expr], step: int) -> Sequence[Expr]:
        """The four registers of a step, from the words of a chunk, four per tile."""

    def activations(self, loaded: Expr, count: int) -> None:
        """Make what was loaded of activations, in place, what is multiplied: as it is."""
        return

    def multiply(
        self, totals: Expr, first: Expr, weights: Sequence[Expr], tokens: Sequence[Expr]
    ) -> None:
        """Add the product of 16 columns with 8 tokens to `totals[first : first + 4]`."""
        sums = [totals[first + i] for i in range(4)]
        emit(self.mma, *sums, *weights, *tokens, *sums)

    def clear(self, totals: Expr, count: int) -> None:
        """Begin sums."""
        with unrolled(count) as i:
            store(totals, constant(0, self.register), i)


class W4A16(Product):
    """Codes 0 to 15 become float16 by being put into the mantissa of 1024: 1024 + code.

    The upper of two codes in a byte is 16 times as much there: one fma makes up for it.  (Kim et
    al., "Who Says Elephants Can't Run", 2022.)
    """

    def fragment(self, words: Sequence[Expr], step: int) -> Sequence[Expr]:
        """Numbers from -8 to 7, exactly."""
        result, shifted = registers("uint32", 4), registers("uint32", 1)
        store(shifted, words[step] >> _word(8), 0)
        for register in range(4):
            word = words[step] if register < 2 else shifted[0]
            mask = _word(0x000F000F if register % 2 == 0 else 0x00F000F0)
            # (word & mask) | 1024 in both halves
            emit("lop3.b32", result[register], word, mask, _word(0x64006400), 0xEA)
            if register % 2 == 0:
                emit("sub.f16x2", result[register], result[register], _word(0x64086408))
            else:
                sixteenth, offset = _word(0x2C002C00), _word(0xD480D480)
                emit("fma.rn.f16x2", result[register], result[register], sixteenth, offset)
        return [result[i] for i in range(4)]


class EightBit(Product):
    """Weights are multiplied as they are stored."""

    def fragment(self, words: Sequence[Expr], step: int) -> Sequence[Expr]:
        """The words of the tile that the step is."""
        return words[4 * step : 4 * step + 4]


class W8A8(EightBit):
    """Activations come as uint8 with zero point 128: with the top bit flipped, int8."""

    def activations(self, loaded: Expr, count: int) -> None:
        """Flip it."""
        for i in range(count):
            store(loaded, loaded[i] ^ _word(0x80808080), i)


def _word(value: int) -> Expr:
    return constant(value, "uint32")


PRODUCTS: dict[str, Product] = {
    "QMatMulW4A16": W4A16("x", 1, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"),
    "QMatMulW8A8": W8A8(
        "q", 4, "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", "uint32", nothing=0x80808080
    ),
    "QMatMulFp8": EightBit("q", 4, "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"),
}
