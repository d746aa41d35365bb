"""Kernels called directly, on memory that faults one byte past its end, and their reference."""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from instruction_sets import substitute
from numpy.typing import NDArray

from qcompiler.targets.toolchain import find_linker
from qcompiler.targets.x86 import ISAS, Isa
from qcompiler.targets.x86.tile import tile_shape

Array = NDArray[Any]

_LIBC = ctypes.CDLL(None, use_errno=True)
_PROT_NONE = 0
_counter = itertools.count()


def load(functions: Mapping[str, Any], folder: Path, isa: Isa = ISAS[0]) -> ctypes.CDLL:
    """A library with these TIR functions as its exports."""
    from qcompiler.targets import tir

    chosen = substitute(isa)
    content = tir.compile_object(functions, chosen.mcpu, chosen.features, chosen.options)
    path = folder / f"kernels{next(_counter)}.so"
    path.write_bytes(find_linker().link([content], list(functions)))
    return ctypes.CDLL(str(path))


class Guarded:
    """Arrays between two pages that cannot be touched; each ends where the second page begins."""

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []

    def __call__(self, array: Array) -> Array:
        page = mmap.PAGESIZE
        size = -(-max(array.nbytes, 1) // page) * page
        memory = mmap.mmap(-1, size + 2 * page)
        self._maps.append(memory)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for start in (base, base + page + size):
            assert _LIBC.mprotect(ctypes.c_void_p(start), page, _PROT_NONE) == 0
        end = page + size
        view = np.frombuffer(memory, np.uint8)[end - array.nbytes : end]
        copy = view.view(array.dtype).reshape(array.shape)
        copy[...] = array
        return copy


def pointer(array: Array) -> ctypes.c_void_p:
    """The address of an array's data."""
    return ctypes.c_void_p(array.ctypes.data)


def pack(w: Array, isa: Isa, anchor: str = "QMatMulW8A8") -> tuple[Array, Array]:
    """What the library's packing makes of w [K, N]: panels and `init`."""
    from qcompiler.targets.x86.units import multiplier_of

    unit = multiplier_of(anchor, isa)
    (k, n), shape, depth = w.shape, tile_shape(w.shape[1], isa), unit.depth
    groups, panels = -(-k // depth), -(-n // shape.columns)
    padded = np.zeros((groups * depth, panels * shape.columns), np.int8)
    padded[:k, :n] = w
    blocks = padded.reshape(groups, depth, panels, shape.vectors, 16).transpose(2, 0, 3, 4, 1)
    packed = np.ascontiguousarray(blocks)
    if unit.splits:
        packed = (packed.view(np.uint8) ^ 0x80).view(np.int8)
    return packed, -128 * padded.sum(0, dtype=np.int32)


def split_rows(q: Array, isa: Isa) -> tuple[Array, Array, Array, Array, Array]:
    """Rows q [M, K] as a kernel that splits them reads them: rows, starts, and what they lack."""
    (m, k), most = q.shape, tile_shape(1, isa).rows
    groups, tiles, eights = -(-k // 4), -(-m // most), -(-k // 8)
    a = np.zeros((m, 8 * eights), np.int32)
    a[:, :k] = q.astype(np.int32) - 128
    first = _too_much(a) - _too_much(-a)
    rest = np.where(_pair_sums(first, 1) > 128, np.maximum(first, 0), 0)
    rest -= np.where(_pair_sums(first, -1) > 128, np.maximum(-first, 0), 0)
    rest[..., ::2] = 0  # the second element is at most 128
    lacking = np.stack([first - rest, rest], axis=1).astype(np.int8).view(np.int32)
    shape = tiles, 3 * eights, most
    counts, numbers = np.zeros(tiles, np.int32), np.zeros(shape, np.uint16)
    values, height = np.zeros(shape, np.int32), -(-m // tiles)
    for tile in range(tiles):
        start = min(tile * height, m - height)
        for i in range(height):
            part, found = np.nonzero(lacking[start + i])
            counts[tile] = max(counts[tile], found.size)
            numbers[tile, : found.size, i] = found
            values[tile, : found.size, i] = lacking[start + i, part, found]
    split = (a - first)[:, : 4 * groups].astype(np.int8).view(np.uint8)
    return split, -128 * a.sum(1, dtype=np.int32), counts, numbers, values


def _pair_sums(a: Array, sign: int) -> Array:
    """Of each element's pair, what is of this sign."""
    return np.maximum(sign * a, 0).reshape(len(a), -1, 2).sum(-1).repeat(2, axis=1)


def _too_much(a: Array) -> Array:
    """What the positive of each four have beyond 128: of one pair if it can, the later rather."""
    fours = np.maximum(a, 0).reshape(len(a), -1, 2, 2, 2).swapaxes(2, 3).reshape(-1, 2, 2)
    earlier, later = fours.sum(2).T
    over = np.maximum(earlier + later - 128, 0)
    of_earlier = (over > later) & (over <= np.minimum(earlier, 128))
    of_later = np.where(of_earlier, 0, np.minimum(over, later))
    shares = np.stack([over - of_later, of_later], axis=1)
    first = np.minimum(fours[..., 0], shares)
    taken = np.stack([first, shares - first], axis=2)
    return taken.reshape(len(a), -1, 2, 2, 2).swapaxes(2, 3).reshape(a.shape)


def operands(q: Array, w: Array, isa: Isa) -> tuple[Array, list[Array]]:
    """The activations and the operands from the weights on of a product of W8A8."""
    from qcompiler.targets.x86.families import splits_rows

    weights, init = pack(w, isa)
    if not splits_rows("QMatMulW8A8", isa):
        return q, [weights, init]
    split, starts, *excess = split_rows(q, isa)
    return split, [weights, starts, *excess]


def quantize(x: Array) -> tuple[Array, Array]:
    """The definition of Quantize, in float32."""
    amax = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-20))
    scale = amax / np.float32(127)
    return (np.rint(x / scale) + 128).astype(np.uint8), scale


def accumulate(q: Array, w: Array) -> Array:
    """The exact int32 sums of QMatMulW8A8."""
    sums: Array = (q.astype(np.int32) - 128) @ w.astype(np.int32)
    return sums
