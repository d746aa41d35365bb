"""Attention with products of bfloat16, for CPUs with AVX512-BF16.

Queries, keys, values and weights are rounded to bfloat16 (8 bits of mantissa) and multiplied two at
a time; sums, scores and exponentials stay float32.  The result is good to about 47 dB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qcompiler.targets import tir
from qcompiler.targets.tir import LANES, Expr, Register
from qcompiler.targets.x86.attention import Attention, attention_function
from qcompiler.targets.x86.attention_shape import PANEL, TILE_ROWS, AttentionShape
from qcompiler.targets.x86.isa import AVX512_BF16
from qcompiler.targets.x86.running_softmax import RunningSoftmax
from qcompiler.targets.x86.vector import VectorUnit, load_lanes

__all__ = ["attention_bf16_function"]

# TVM knows no vector of bfloat16 that these intrinsics would take.
_LLVM = """
define <16 x float> @qc_dpbf16(<16 x float> %c, <16 x i32> %a, <16 x i32> %b) #0 {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
      <16 x float> %c, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}
define <16 x i32> @qc_to_bf16(<16 x float> %high, <16 x float> %low) #0 {
  %r = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(
      <16 x float> %high, <16 x float> %low)
  %y = bitcast <32 x bfloat> %r to <16 x i32>
  ret <16 x i32> %y
}
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
    <16 x float>, <32 x bfloat>, <32 x bfloat>)
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)
attributes #0 = { alwaysinline nounwind willreturn memory(none)
    "target-cpu"="cooperlake" "target-features"="+avx512f,+avx512bf16,+avx512bw,+avx512vl" }
"""


def attention_bf16_function(d: int, *, is_masked: bool) -> Any:
    """The TIR of `attention_function`, with products of bfloat16."""
    return attention_function(d, _AttentionBf16, AVX512_BF16, is_masked=is_masked)


def _pack(low: Expr, high: Expr) -> Expr:
    """Two vectors of float32 as one of 32 bfloat16, in order, in lanes of two."""
    return tir.inlined("int32x16", "qc_to_bf16", high, low)


class _SoftmaxBf16(RunningSoftmax):
    """Its weights are bfloat16, two keys to a lane."""

    def __init__(self, shape: AttentionShape, unit: VectorUnit) -> None:
        super().__init__(shape, unit)
        self.weight_stride = self.stride // 2
        self.weights = tir.scratch("int32", TILE_ROWS * self.weight_stride)

    def store_weights(self, i: int, panel: Expr, weights: Sequence[Register], packed: bool) -> None:
        """The exponentials of a panel of row i."""
        if not packed:
            super().store_weights(i, panel, weights, packed)
            return
        low, high = (weight.value for weight in weights)
        index = i * self.weight_stride + panel * (PANEL // 2)
        tir.store(self.weights, _pack(low, high), tir.lanes(index))


class _AttentionBf16(Attention):
    lane = "int32"
    pair = 2

    def emit(self) -> None:
        """Everything."""
        with tir.imported(_LLVM):
            super().emit()

    def running_softmax(self, shape: AttentionShape, unit: VectorUnit) -> RunningSoftmax:
        """What keeps the scores and their weights."""
        return _SoftmaxBf16(shape, unit)

    def dot(self, total: Expr, one: Expr, other: Expr) -> Expr:
        """`total` plus the products of two vectors of lanes."""
        return tir.inlined("float32x16", "qc_dpbf16", total, one, other)

    def key_lanes(self, start: Expr, first: Expr, width: int) -> Expr:
        """A vector of lanes from `width` numbers of a key, zeros after them."""
        return _pack(*_halves(self._a["k"], start + first, width))

    def store_query(self, i: Expr, start: Expr, first: int, width: int) -> None:
        """`width` numbers of a query, scaled, to row i."""
        scale = tir.broadcast(self._a["scale"])
        low, high = _halves(self._a["q"], start + first, width)
        index = i * self._query_stride + first // 2
        tir.store(self._q, _pack(low * scale, high * scale), tir.lanes(index))

    def pack_values(self, first: Expr, count: Expr) -> None:
        """The block's values, two keys to a lane; an odd last one is paired with itself."""
        zipped = [lane // 2 + 16 * (lane % 2) for lane in range(2 * LANES)]
        with tir.loop(0, (count + 1) // 2) as pair:
            keys = [pair * 2, tir.minimum(pair * 2 + 1, count - 1)]
            starts = [Register("int32", (first + key) * self._a["v_stride"], 1) for key in keys]
            for chunk in range(0, self._d, LANES):
                width = min(LANES, self._d - chunk)
                rows = [load_lanes(self._a["v"], start.value + chunk, width) for start in starts]
                words = Register("int32", _pack(*rows))
                halves = tir.shuffle(tir.reinterpret("uint16x32", words.value), zipped)
                index = tir.lanes(pair * self._padded_d + chunk)
                tir.store(self._v, tir.reinterpret("int32x16", halves), index)


def _halves(array: Expr, start: Expr, width: int) -> tuple[Expr, Expr]:
    """Up to 32 floats as two vectors, zeros after them."""
    low = load_lanes(array, start, min(width, LANES))
    if width <= LANES:
        return low, tir.broadcast(0.0)
    return low, load_lanes(array, start + LANES, width - LANES)
