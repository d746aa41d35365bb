"""A layer that a pass has rounded, now or in an earlier run, and what it does to the model.

`gptq` depends on all that goes into a layer, and keeps its layers by the hash of model and samples.
Where a weight, and what was found out about its inputs before, is all that counts, layers are kept
by the hash of those: `rounded_or_kept`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.decisions import add_note
from qcompiler.passes.layer_cache import LayerCache, arrays_digest
from qcompiler.passes.rounded_weight import Layer, RoundedWeight, finite_weight
from qcompiler.passes.second_moments import LayerRuns, Progress

__all__ = ["RoundedLayer", "decibels", "rounded_or_kept"]

Round = Callable[..., tuple[RoundedWeight, str]]
"""From a weight and its type to the rounded weight, and how good it is, for people."""


@dataclasses.dataclass(frozen=True)
class RoundedLayer:
    """A layer that is done.

    Attributes:
        layer: Which one.
        rounded: Its weight.
        note: How good it is, for people.
        kept: Whether an earlier run did it.
        unkept: Why a later run will not find it, for people; nothing if it will.
    """

    layer: Layer
    rounded: RoundedWeight
    note: str
    kept: bool = False
    unkept: str = ""

    @classmethod
    def kept_as(cls, layer: Layer, arrays: Mapping[str, NDArray[Any]]) -> RoundedLayer:
        """A layer of an earlier run."""
        rounded = RoundedWeight.from_arrays(arrays, layer.type)
        return cls(layer, rounded, str(arrays["note"]), kept=True)

    @classmethod
    def kept_in(
        cls, cache: LayerCache, layer: Layer, rounded: RoundedWeight, note: str
    ) -> RoundedLayer:
        """A layer of this run, which a later one will find."""
        arrays = rounded.to_arrays() | {"note": np.asarray(note)}
        return cls(layer, rounded, note, unkept=cache.put(layer.name, arrays))

    def place(self, graph: ir.Graph, tell: Progress, done: int) -> None:
        """Let the products read it, and say how good it is; so many are done then."""
        self.layer.replace(graph, self.rounded)
        for node in self.layer.nodes:
            add_note(node, self.note)
        again = "kept from an earlier run: " if self.kept else ""
        tell(f"{self.layer.name}: {again}{self.note}{self.unkept}", done, kept=self.kept)


def rounded_or_kept(
    layers: Sequence[Layer],
    runs: LayerRuns,
    method: tuple[str, str],
    work: Round,
    *facts: NDArray[Any],
) -> Iterator[RoundedLayer]:
    """Layers, each rounded by itself, side by side; the model may be changed between them.

    Args:
        layers: What to round.
        runs: Where.
        method: The name of the pass, and its options as text.
        work: Rounds one.
        facts: What the result depends on, beside the weight and its type.

    Raises:
        ModelError: A weight holds NaN or Inf.
        OptionError: The executor fails.
    """
    weights = [finite_weight(layer.nodes[0], layer.weight) for layer in layers]
    name, options = method
    caches = [
        LayerCache(name, arrays_digest(weight, *facts), options, [layer])
        for layer, weight in zip(layers, weights, strict=True)
    ]
    found = [cache.get(layer.name) for cache, layer in zip(caches, layers, strict=True)]
    missing = [index for index, arrays in enumerate(found) if arrays is None]
    types = [layers[index].type for index in missing]
    rounded = dict(zip(missing, runs.map(work, [weights[i] for i in missing], types), strict=True))
    for index, (layer, arrays) in enumerate(zip(layers, found, strict=True)):
        if arrays is None:
            yield RoundedLayer.kept_in(caches[index], layer, *rounded[index])
        else:
            yield RoundedLayer.kept_as(layer, arrays)


def decibels(signal: float, noise: float) -> str:
    """How much larger one is than the other, for people."""
    return f"{10 * np.log10(max(signal, 1e-30) / max(noise, 1e-30)):.1f} dB"
