"""Layers that were rounded, on disk, found again by the hash of all that they depend on.

A layer depends on the model, the samples, the options and, because what is rounded before it goes
into it, on the types of all layers.  Nothing of another model is ever found.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from qcompiler.ir.errors import ToolchainError
from qcompiler.passes.rounded_weight import Layer, RoundedWeight
from qcompiler.targets.cache import KernelCache, content_key

__all__ = ["LayerCache"]


class LayerCache:
    """The layers of one model, rounded in one way."""

    def __init__(self, method: str, digest: str, options: str, layers: Sequence[Layer]) -> None:
        """Say what they depend on.

        Args:
            method: The name of the pass.
            digest: Hash of model and samples.
            options: Of the pass, as text.
            layers: All that will be rounded.
        """
        types = (f"{layer.name} {layer.type}" for layer in layers)
        self._key = content_key(method, "1", digest, options, *types)
        self._cache = KernelCache()

    def get(self, layer: Layer) -> tuple[RoundedWeight, str] | None:
        """What `put` kept, in this process or another."""
        content = self._cache.get(self._of(layer))
        if content is None:
            return None
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            storage = layer.type.storage.numpy()
            zero = arrays["zero"].astype(storage) if "zero" in arrays else None
            rounded = RoundedWeight(arrays["stored"].astype(storage), arrays["scale"], zero)
            return rounded, str(arrays["note"])

    def put(self, layer: Layer, rounded: RoundedWeight, note: str) -> None:
        """Keep a layer, if the folder can be written: only time depends on it."""
        wide = np.int16  # numpy's own file format does not know types of 4 bits
        arrays = {"stored": rounded.stored.astype(wide), "scale": rounded.scale, "note": note}
        if rounded.zero_point is not None:
            arrays["zero"] = rounded.zero_point.astype(wide)
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)
        try:
            self._cache.put(self._of(layer), content.getvalue())
        except ToolchainError:
            return

    def _of(self, layer: Layer) -> str:
        return content_key(self._key, layer.name, str(layer.weight.name))
