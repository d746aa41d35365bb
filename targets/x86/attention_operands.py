"""The operands of attention, packed for its products: queries, and keys and values of a block."""

from __future__ import annotations

from collections.abc import Sequence

from qcompiler.targets import tir
from qcompiler.targets.tir import LANES, Expr, Register
from qcompiler.targets.x86.attention_row import row_starts
from qcompiler.targets.x86.attention_shape import PANEL, TILE_ROWS, attention_shape
from qcompiler.targets.x86.vector import load_lanes, transpose

__all__ = ["AttentionOperands"]


class AttentionOperands:
    """Emits their packing.

    What is multiplied are lanes of 32 bits: a float32 here, `pair` smaller numbers in a subclass.
    """

    lane = "float32"
    pair = 1
    shape = staticmethod(attention_shape)

    def __init__(self, d: int, arguments: dict[str, Expr]) -> None:
        shape = self.shape(d)
        self._d, self._padded_d, self._block = d, shape.padded_d, shape.keys
        self._a = arguments
        self._depth = -(-d // self.pair)
        self._query_stride = -(-self._depth // LANES) * LANES
        self._q = tir.scratch(self.lane, shape.rows * self._query_stride)
        self._k = tir.scratch(self.lane, shape.keys * self._depth)
        self._v = tir.scratch(self.lane, shape.keys // self.pair * shape.padded_d)

    def key_lanes(self, start: Expr, first: Expr, width: int) -> Expr:
        """A vector of lanes from `width` numbers of a key, zeros after them."""
        return load_lanes(self._a["k"], start + first, width)

    def pack_queries(self) -> None:
        """All rows; those that the last tile has too many are copies of the last."""
        rows, step = self._a["rows"], LANES * self.pair
        with tir.loop(0, ((rows + (TILE_ROWS - 1)) // TILE_ROWS) * TILE_ROWS) as i:
            start = Register("int32", tir.minimum(i, rows - 1) * self._a["q_stride"], 1)
            for first in range(0, self._d, step):
                self.store_query(i, start.value, first, min(step, self._d - first))

    def store_query(self, i: Expr, start: Expr, first: int, width: int) -> None:
        """`width` numbers of a query, scaled, to row i."""
        values = load_lanes(self._a["q"], start + first, width) * tir.broadcast(self._a["scale"])
        tir.store(self._q, values, tir.lanes(i * self._query_stride + first))

    def pack_values(self, first: Expr, count: Expr) -> None:
        """The block's values without gaps."""
        with tir.loop(0, count) as key:
            source = Register("int32", (first + key) * self._a["v_stride"], 1)
            for chunk in range(0, self._d, LANES):
                values = load_lanes(self._a["v"], source.value + chunk, min(LANES, self._d - chunk))
                tir.store(self._v, values, tir.lanes(key * self._padded_d + chunk))

    def pack_keys(self, first: Expr, count: Expr) -> None:
        """To [panel][d][32]; the keys after the last are copies of it."""
        with tir.loop(0, (count + (PANEL - 1)) // PANEL * (PANEL // LANES)) as group:
            starts = row_starts(self._a["k_stride"], first, count, group)
            target = (group // 2) * (self._depth * PANEL) + (group % 2) * LANES
            self.pack_16_keys(starts, target, group * LANES)

    def pack_16_keys(self, starts: Sequence[Register], target: Expr, key: Expr) -> None:
        """The keys at `starts`, which are those from `key` on, transposed to half of a panel."""
        step = LANES * self.pair
        whole, rest = divmod(self._d, step)
        if whole:
            with tir.loop(0, whole) as chunk:
                self._transpose_keys(starts, target, chunk, step)
        if rest:
            self._transpose_keys(starts, target, tir.constant(whole, "int32"), rest)

    def _transpose_keys(
        self, starts: Sequence[Register], target: Expr, chunk: Expr, width: int
    ) -> None:
        first = chunk * (LANES * self.pair)
        rows = [Register(self.lane, self.key_lanes(start.value, first, width)) for start in starts]
        for i, column in enumerate(transpose(rows, self.lane)[: -(-width // self.pair)]):
            tir.store(self._k, column.value, tir.lanes(target + (chunk * LANES + i) * PANEL))
