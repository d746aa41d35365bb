"""Kernels called directly, on memory that faults one byte past its end, and their reference."""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from instruction_sets import substitute
from numpy.typing import NDArray

from qcompiler.targets.toolchain import find_linker
from qcompiler.targets.x86 import ISAS, Isa
from qcompiler.targets.x86.tile import tile_shape

Array = NDArray[Any]

FEW = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SIZES = st.integers(1, 140)

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


def int8(rng: np.random.Generator, *shape: int) -> Array:
    """Any of them."""
    return rng.integers(-128, 128, shape).astype(np.int8)


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


def pack(w: Array, isa: Isa) -> tuple[Array, Array]:
    """What the library's packing makes of w [K, N]: panels and `init`."""
    from qcompiler.targets.x86.units import unit_of

    (k, n), shape = w.shape, tile_shape(w.shape[1], isa)
    groups, panels = -(-k // 4), -(-n // shape.columns)
    padded = np.zeros((groups * 4, panels * shape.columns), np.int8)
    padded[:k, :n] = w
    blocks = padded.reshape(groups, 4, panels, shape.vectors, 16).transpose(2, 0, 3, 4, 1)
    packed, sums = np.ascontiguousarray(blocks), padded.sum(0, dtype=np.int32)
    if unit_of(isa).splits:
        return (packed.view(np.uint8) ^ 0x80).view(np.int8), sums
    return packed, -128 * sums


def split_rows(
    q: Array, isa: Isa, z: int | Array, most: int
) -> tuple[Array, Array, Array, Array, Array]:
    """Rows q [M, K] as a kernel that splits them reads them: rows, starts, and what they lack.

    They are less z, or z [M, 1].  Two groups lack at most `most` numbers.
    """
    (m, k), height = q.shape, tile_shape(1, isa).rows
    groups, tiles, eights = -(-k // 4), -(-m // height), -(-k // 8)
    a = np.zeros((m, 8 * eights), np.int32)
    a[:, :k] = q.astype(np.int32) - z
    above, below = _too_much(np.maximum(a, 0), 127), _too_much(np.maximum(-a, 0), 128)
    excess, noted = above - below, []
    while len(noted) < 2 or above.any() or below.any():
        some_above, some_below = _at_once(above, 127), _at_once(below, 128)
        noted.append(some_above - some_below)
        above, below = above - some_above, below - some_below
    lacking = np.stack(noted, axis=1).astype(np.int8).view(np.int32)
    shape = tiles, most * eights, height
    counts, numbers = np.zeros(tiles, np.int32), np.zeros(shape, np.uint16)
    values, rows = np.zeros(shape, np.int32), -(-m // tiles)
    for tile in range(tiles):
        start = min(tile * rows, m - rows)
        for i in range(rows):
            part, found = np.nonzero(lacking[start + i])
            counts[tile] = max(counts[tile], found.size)
            numbers[tile, : found.size, i] = found
            values[tile, : found.size, i] = lacking[start + i, part, found]
    split = (a - excess)[:, : 4 * groups].astype(np.int8).view(np.uint8)
    return split, -128 * a.sum(1, dtype=np.int32), counts, numbers, values


def _at_once(a: Array, most: int) -> Array:
    """Of each pair at most this much, of the first element rather."""
    first = np.minimum(a[:, ::2], most)
    second = np.minimum(a[:, 1::2], most - first)
    return np.stack([first, second], axis=2).reshape(a.shape)


def _too_much(a: Array, most: int) -> Array:
    """What each four have beyond `most`: of one pair if it can, the later rather."""
    fours = a.reshape(len(a), -1, 2, 2, 2).swapaxes(2, 3).reshape(-1, 2, 2)
    earlier, later = fours.sum(2).T
    over = np.maximum(earlier + later - most, 0)
    of_earlier = (over > later) & (over <= np.minimum(earlier, most))
    of_later = np.where(of_earlier, 0, np.minimum(over, later))
    shares = np.stack([over - of_later, of_later], axis=1)
    first = np.minimum(fours[..., 0], shares)
    taken = np.stack([first, shares - first], axis=2)
    return taken.reshape(len(a), -1, 2, 2, 2).swapaxes(2, 3).reshape(a.shape)


def centres(q: Array, z: int) -> Array:
    """Where rows q [M, K] are split, [M, 1]: at z, or if they lie elsewhere at their mean."""
    mean = q.sum(1, keepdims=True, dtype=np.int64) // q.shape[1]
    far, from_mean = (np.abs(q - c).sum(1, keepdims=True) for c in (np.int64(z), mean))
    elsewhere = (far >= 16 * q.shape[1]) & (from_mean * 5 < far * 4)
    return np.where(elsewhere, mean, z).astype(np.int32)


def operands(
    q: Array, w: Array, isa: Isa, anchor: str = "QMatMulW8A8", z: int = 128
) -> tuple[Array, list[Array], list[Array]]:
    """The activations of a product, its operands up to the scales of weights, and those after."""
    from qcompiler.targets.x86.w8_family import most_lacking

    weights, init = pack(w, isa)
    most = most_lacking(anchor, isa)
    if not most:
        return q, [weights, init // 128 * z], []
    at = centres(q, z) if anchor != "QMatMulW8A8" else np.full((len(q), 1), z, np.int32)
    split, starts, *excess = split_rows(q, isa, at, most)
    after = [z - at, init] if anchor != "QMatMulW8A8" else []
    return split, [weights, starts, *excess], after


def quantize(x: Array) -> tuple[Array, Array]:
    """The definition of Quantize, in float32."""
    amax = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-20))
    scale = amax / np.float32(127)
    return (np.rint(x / scale) + 128).astype(np.uint8), scale


def accumulate(q: Array, w: Array) -> Array:
    """The exact int32 sums of QMatMulW8A8."""
    sums: Array = (q.astype(np.int32) - 128) @ w.astype(np.int32)
    return sums
