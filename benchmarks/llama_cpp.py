"""How llama.cpp rounds weights: by its own library, ggml, as a package of a public registry has it.

Its blocks lie along K, as ours do.  A block of Q4_K has 256 weights, 8 groups of 32 with scales and
minima of 6 bits; columns that are no multiple of that are padded with zeros here, which changes no
other group, where llama.cpp itself would take Q5_0 for all of the matrix.
"""

from __future__ import annotations

import ctypes
import functools

import numpy as np
from numpy.typing import NDArray
from packages import package

KINDS = {"Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q4_K": (12, 256, 144)}
"""Number in ggml, weights of a block, bytes of a block."""

_GGML = "pywhispercpp==1.5.1"


def bits_of(kind: str) -> float:
    """Bits per weight, scales among them."""
    _, block, size = KINDS[kind]
    return 8 * size / block


def rounded(weight: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    """A matrix [K, N] as it comes back."""
    number, block, size = KINDS[kind]
    rows = np.ascontiguousarray(np.pad(weight.T, ((0, 0), (0, -len(weight) % block))), np.float32)
    stored = np.zeros(rows.size // block * size, np.uint8)
    library = _library()
    written = library.ggml_quantize_chunk(
        ctypes.c_int(number), _address(rows), _address(stored), ctypes.c_int64(0),
        ctypes.c_int64(len(rows)), ctypes.c_int64(rows.shape[1]), None,
    )  # fmt: skip
    assert written == stored.size, (written, stored.size)
    back = np.empty_like(rows)
    widen = getattr(library, f"dequantize_row_{kind[:3].lower()}{kind[3:]}")
    widen(_address(stored), _address(back), ctypes.c_int64(rows.size))
    return np.ascontiguousarray(back[:, : len(weight)].T)


@functools.cache
def _library() -> ctypes.CDLL:
    (file,) = package(_GGML).glob("libggml-base.so.0.*")
    library = ctypes.CDLL(str(file))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def _address(array: NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
