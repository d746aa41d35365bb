"""The layers of GPTQ and AWQ checkpoints, unpacked.

          qweight                      qzeros                          g_idx
    GPTQ  int32 [K b / 32, N]          int32 [G, N b / 32], less one   group of each input
    AWQ   int32 [K, N b / 32]          int32 [G, N b / 32]

where the nibbles of AWQ's words hold the columns 0 2 4 6 1 3 5 7 of eight.  The first values are in
the lowest bits.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qcompiler.ir.errors import ModelError
from qcompiler.safetensors import SafeTensors

__all__ = ["CheckpointLayer", "method_of", "unpack_layer"]

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which column of eight the nibbles of a word hold, the lowest first."""


@dataclasses.dataclass(frozen=True)
class CheckpointLayer:
    """One layer of a checkpoint, unpacked.

    Attributes:
        codes: [K, N], unsigned.
        zeros: [G, N], unsigned.
        scales: [G, N].
        groups: The group of each input, [K].
        bits: Of a code.
    """

    codes: NDArray[np.int16]
    zeros: NDArray[np.int16]
    scales: NDArray[np.float32]
    groups: NDArray[np.int64]
    bits: int


def method_of(file: SafeTensors, layer: str, k: int, n: int) -> Literal["gptq", "awq"]:
    """Who packed a layer of [K, N], by the axis along which that was done.

    Raises:
        ModelError: It has neither form.
    """
    packed = file[f"{layer}.qweight"]
    if packed.dtype == np.int32 and packed.ndim == 2:
        rows, columns = packed.shape
        if columns == n and rows < k:
            return "gptq"
        if rows == k and columns < n:
            return "awq"
    raise ModelError(
        f"{file.name}: {layer}.qweight is {packed.dtype} {list(packed.shape)}, which is no packed "
        f"form of the model's [{k}, {n}]"
    )


def unpack_layer(
    file: SafeTensors, layer: str, method: str, shape: tuple[int, int], less_one: bool
) -> CheckpointLayer:
    """One layer of a checkpoint.

    Args:
        file: The checkpoint.
        layer: Its name there.
        method: What `method_of` says.
        shape: [K, N].
        less_one: Whether GPTQ's zero points are stored less one.

    Raises:
        ModelError: Parts of it are missing, or do not fit each other.
    """
    k, n = shape
    missing = [part for part in ("qzeros", "scales") if f"{layer}.{part}" not in file]
    if missing:
        raise ModelError(f"{file.name} has no {layer}.{missing[0]} beside its qweight")
    packed, zeros = file[f"{layer}.qweight"], file[f"{layer}.qzeros"]
    scales = file[f"{layer}.scales"].astype(np.float32)
    if zeros.dtype != np.int32 or zeros.ndim != 2 or scales.ndim != 2 or not scales.size:
        raise ModelError(f"{file.name}: qzeros and scales of {layer} are no packed tables")
    if not np.isfinite(scales).all():
        raise ModelError(f"{file.name}: scales of {layer} hold NaN or Inf")
    bits = packed.size * 32 // (k * n)
    if bits not in (2, 3, 4, 8) or packed.size * 32 != bits * k * n:
        raise ModelError(f"{file.name}: {layer} has {packed.size * 32 / (k * n):.3g} bits a weight")
    if method == "gptq":
        codes = _bits_along_rows(np.ascontiguousarray(packed.T), bits).T
        points = _bits_along_rows(zeros, bits)[:, :n]
        points = (points + less_one) & (2**bits - 1)
    else:
        codes, points = (_awq_columns(table, bits) for table in (packed, zeros))
    groups = _groups(file, layer, k, len(scales))
    known = groups.shape == (k,) and groups.min() >= 0 and groups.max() < len(scales)
    if scales.shape != points.shape or scales.shape[1] != n or not known:
        raise ModelError(f"{file.name}: scales, qzeros and g_idx of {layer} do not fit each other")
    return CheckpointLayer(codes, points, scales, groups, bits)


def _groups(file: SafeTensors, layer: str, k: int, count: int) -> NDArray[np.int64]:
    """The group of each input."""
    if f"{layer}.g_idx" in file:
        return file[f"{layer}.g_idx"].astype(np.int64)
    if k % count:
        raise ModelError(
            f"{file.name}: {layer} has {count} groups of {k} inputs together, which do not go into "
            "that number, and no g_idx that says how large they are"
        )
    return np.arange(k) // (k // count)


def _bits_along_rows(words: NDArray[np.int32], bits: int) -> NDArray[np.int16]:
    """Numbers of a stream of bits per row, the lowest bits first; 3 bits may lie in two words."""
    rows = len(words)
    octets = np.ascontiguousarray(words, "<i4").view(np.uint8).reshape(rows, -1)
    stream = np.unpackbits(octets, axis=1, bitorder="little")
    digits = stream[:, : stream.shape[1] // bits * bits].reshape(rows, -1, bits)
    return np.asarray(digits @ (1 << np.arange(bits)), np.int16)


def _awq_columns(words: NDArray[np.int32], bits: int) -> NDArray[np.int16]:
    if bits != 4:
        raise ModelError(f"weights of AWQ have 4 bits, not {bits}")
    nibbles = _bits_along_rows(words, bits).reshape(len(words), -1, 8)
    columns = np.empty_like(nibbles)
    columns[..., list(_AWQ_ORDER)] = nibbles
    return columns.reshape(len(words), -1)
