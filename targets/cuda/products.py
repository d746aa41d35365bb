"""The kinds of products: how each makes operands of `mma.sync` of what it loads.

A *fragment* is what one lane holds of the 16-row operand, four registers.  Everything else about
the kernels (`stream.py`, `tile.py`) is the same for all kinds, because it is about bytes: one mma
takes 32 bytes of an activation's row, and 16 bytes of packed weights per lane are a tile.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence

from qcompiler.ir.region import Region
from qcompiler.targets.cuda.device import (
    Expr,
    cast,
    constant,
    emit,
    let,
    registers,
    store,
    unrolled,
)
from qcompiler.targets.cuda.packing import FOUR_BITS, INTEGERS

__all__ = ["STEPS", "Product", "offsets_of", "product_of"]

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
        group_mma: The end of the name of the `wgmma` for this kind.
        group_scales: The constants it takes last: signs, and that rows of tokens are along K.
        is_rough: Whether the instruction keeps too few bits of a sum for all of K: tensor cores are
            said to add FP8 with 14 (DeepSeek-V3 Technical Report, 2024, 3.3.2), 50 dB at K = 4096.
            Those of a chunk are added up as float32.
    """

    activation: str
    tiles: int
    mma: str
    group_mma: str
    group_scales: tuple[int, ...]
    register: str = "float32"
    is_rough: bool = False

    @abstractmethod
    def fragment(
        self, words: Sequence[Expr], step: int, offsets: Sequence[Expr] = ()
    ) -> list[Expr]:
        """The weights of a step, from the words of a chunk, four per tile.

        `offsets` are those of weights with zero points, of `offsets_of` a group of two columns.
        """

    def operand(self, words: Sequence[Expr]) -> list[Expr]:
        """The two words of activations that a lane holds of 8 tokens, as they are multiplied."""
        return list(words)

    def multiply(
        self, totals: Expr, first: Expr, weights: Sequence[Expr], tokens: Sequence[Expr]
    ) -> None:
        """Add the product of 16 columns with 8 tokens to `totals[first : first + 4]`."""
        sums = [totals[first + i] for i in range(4)]
        emit(self.mma, *sums, *weights, *tokens, *sums)

    def multiply_group(
        self, rows: int, sums: Sequence[Expr], weights: Sequence[Expr], tokens: Expr, adds: bool
    ) -> None:
        """The product of a warpgroup's 64 columns with `rows` tokens in shared memory.

        `sums` become that, or it is added to them.
        """
        name = f"wgmma.mma_async.sync.aligned.m64n{rows}{self.group_mma}"
        emit(name, *sums, *weights, tokens, constant(int(adds), "bool"), *self.group_scales)

    def clear(self, totals: Expr, count: int) -> None:
        """Begin sums."""
        with unrolled(count) as i:
            store(totals, constant(0, self.register), i)


class FourBits(Product):
    """Codes 0 to 15 become float16 by being put into the mantissa of 1024: 1024 + code.

    The upper of two codes in a byte is 16 times as much there: one fma makes up for it.  (Kim et
    al., "Who Says Elephants Can't Run", 2022.)  Zero points become float16 in the same way.
    """

    def fragment(
        self, words: Sequence[Expr], step: int, offsets: Sequence[Expr] = ()
    ) -> list[Expr]:
        """Numbers from -15 to 15, exactly."""
        lower, upper = offsets or (_word(0x64086408), _word(0xD480D480))
        result, shifted = registers("uint32", 4), registers("uint32", 1)
        store(shifted, words[step] >> _word(8), 0)
        for register in range(4):
            word = words[step] if register < 2 else shifted[0]
            mask = _word(0x000F000F if register % 2 == 0 else 0x00F000F0)
            # (word & mask) | 1024 in both halves
            emit("lop3.b32", result[register], word, mask, _word(0x64006400), 0xEA)
            if register % 2 == 0:
                emit("sub.f16x2", result[register], result[register], lower)
            else:
                sixteenth = _word(0x2C002C00)
                emit("fma.rn.f16x2", result[register], result[register], sixteenth, upper)
        return [result[i] for i in range(4)]


class EightBit(Product):
    """Weights are multiplied as they are stored."""

    def fragment(
        self, words: Sequence[Expr], step: int, offsets: Sequence[Expr] = ()
    ) -> list[Expr]:
        """The words of the tile that the step is."""
        return list(words[4 * step : 4 * step + 4])


class Fp8AsHalf(EightBit):
    """FP8 widened to float16, exactly, for sm_90, whose `mma.sync` has no FP8.

    ptxas widens too, but sums each product apart: twice as many additions as products.  The lower
    two of a word's four bytes make one operand of 16 rows, the upper two another.
    """

    def fragment(
        self, words: Sequence[Expr], step: int, offsets: Sequence[Expr] = ()
    ) -> list[Expr]:
        """Two fragments."""
        return self.operand(super().fragment(words, step))

    def operand(self, words: Sequence[Expr]) -> list[Expr]:
        """The lower halves of the words, then the upper."""
        pair, result = registers("uint16", 1), registers("uint32", 2 * len(words))
        for i in range(2 * len(words)):
            upper, word = divmod(i, len(words))
            store(pair, cast("uint16", words[word] >> _word(16 * upper)), 0)
            emit("cvt.rn.f16x2.e4m3x2", result[i], pair[0])
        return [result[i] for i in range(2 * len(words))]

    def multiply(
        self, totals: Expr, first: Expr, weights: Sequence[Expr], tokens: Sequence[Expr]
    ) -> None:
        """Add both products."""
        super().multiply(totals, first, weights[:4], tokens[:2])
        super().multiply(totals, first, weights[4:], tokens[2:])


def offsets_of(offsets: Expr, index: int, pair: Expr) -> None:
    """Two words, from `index` on, of the zero points of two columns as `packing.py` stores them.

    1024 + z in both halves, what a code of the first column is taken from; then -(64 + z), of the
    second, whose code is added as 64 + code.
    """
    zeros = let(cast("uint32", pair))
    emit("prmt.b32", offsets[index], zeros, _word(0x64646464), _word(0x4040))
    emit("prmt.b32", offsets[index + 1], zeros, _word(0xD4D4D4D4), _word(0x4141))


def _word(value: int) -> Expr:
    return constant(value, "uint32")


_MMA = "mma.sync.aligned.m16n8"
_F16, _E4M3 = ".f32.f16.f16", ".f32.e4m3.e4m3"
_FOUR_BITS = FourBits(
    "x", 1, f"{_MMA}k16.row.col{_F16}.f32", group_mma=f"k16{_F16}", group_scales=(1, 1, 0)
)
_PRODUCTS: dict[str, Product] = {
    **dict.fromkeys(FOUR_BITS, _FOUR_BITS),
    # Activations are uint8, whose zero point counts in `Finish`.
    **dict.fromkeys(INTEGERS, EightBit(
        "q", 4, f"{_MMA}k32.row.col.s32.s8.u8.s32", group_mma="k32.s32.s8.u8", group_scales=(),
        register="uint32",
    )),
    "QMatMulFp8": EightBit(
        "q", 4, f"{_MMA}k32.row.col{_E4M3}.f32", group_mma=f"k32{_E4M3}", group_scales=(1, 1),
        is_rough=True,
    ),
}  # fmt: skip
_FP8_AS_HALF = Fp8AsHalf(
    "q", 4, f"{_MMA}k16.row.col{_F16}.f32", group_mma=f"k16{_F16}", group_scales=(1, 1, 0)
)


def product_of(region: Region, arch: str, by_warpgroup: bool = False) -> Product:
    """The kind of product that a region is; `by_warpgroup` if `wgmma` multiplies."""
    if region.anchor == "QMatMulFp8" and arch == "sm_90a" and not by_warpgroup:
        return _FP8_AS_HALF
    return _PRODUCTS[region.anchor]
