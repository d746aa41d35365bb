"""What was found out about layers, on disk, found again by the hash of all that it depends on.

With samples a layer depends on the model, the samples, the options and, because what is rounded
before it goes into it, on the types of all layers; without them on its weight, type and options.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler.ir.errors import ToolchainError
from qcompiler.passes.rounded_weight import Layer
from qcompiler.targets.cache import KernelCache, content_key

__all__ = ["LayerCache", "arrays_digest"]

_VERSION = "8"
"""To be counted up when a pass rounds differently, or arrays are kept otherwise."""

_LEVEL = 1
"""Of zlib: what is won by more takes as long as rounding the layer."""


class LayerCache:
    """The layers of one model, treated in one way."""

    def __init__(self, method: str, digest: str, options: str, layers: Sequence[Layer]) -> None:
        """Say what they depend on.

        Args:
            method: The name of the pass.
            digest: Hash of model and samples, or of the weight and what is known of its inputs.
            options: Of the pass, as text.
            layers: All that will be looked at.
        """
        types = (f"{layer.name} {layer.weight.name} {layer.type}" for layer in layers)
        self._key = content_key(method, _VERSION, digest, options, *types)
        self._cache = KernelCache()

    def get(self, name: str) -> dict[str, NDArray[Any]] | None:
        """What `put` kept under a name, in this process or another."""
        content = self._cache.get(content_key(self._key, name))
        if content is None:
            return None
        with np.load(io.BytesIO(zlib.decompress(content)), allow_pickle=False) as arrays:
            return dict(arrays)

    def found(self, names: Sequence[str]) -> str:
        """How many of some are there from an earlier run, for people."""
        count = sum(content_key(self._key, name) in self._cache for name in names)
        return (
            f"{count or 'none'} of {len(names)} are there from an earlier run on this model with "
            f"these samples and options ({self._cache.folder})"
        )

    def put(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> str:
        """Keep arrays.

        Returns:
            What to say of it: nothing, or why they are not kept, on which only time depends.
        """
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **arrays)
        try:
            packed = zlib.compress(content.getvalue(), _LEVEL)
            self._cache.put(content_key(self._key, name), packed)
        except ToolchainError as error:
            return f", and not kept for another run: {error}"
        return ""


def arrays_digest(*arrays: NDArray[Any]) -> str:
    """Hash of arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
