"""Scale the inputs of products by what goes into them, so that rounding spares those that matter.

    y = MatMul(x, W)   =>   y = MatMul(x / t, DQ(round(t W)))       t per channel

Lin et al., AWQ (2023).  A row of W that large activations multiply makes a large error; made t
times larger before it is rounded, it makes one of 1 / t.  With m the mean magnitude of each channel
of x,

    t = m^a / sqrt(max m^a min m^a)

where a is what rounds the products that read x with the least error over the samples.  1 / t goes
into the constants before x (`absorb_factors`): a norm, or the matrix of another product; where
nothing can take it, t is 1.  Then scales are found that cut the range of each group where that
lowers the error of the product (`clip_search`), and weights are rounded to nearest; or, as
"awq_gptq", by gptq.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from qcompiler.ir.decisions import add_note
from qcompiler.ir.errors import OptionError
from qcompiler.ir.graph import constant
from qcompiler.ir.on_disk import let_go
from qcompiler.ir.types import QuantType
from qcompiler.passes.absorb_factors import Absorber, absorber_of, scale_constant
from qcompiler.passes.clip_search import BLOCK, diagonal_blocks, error_in_blocks, searched_grid
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.layer_cache import LayerCache
from qcompiler.passes.rounded_layer import decibels, rounded_or_kept
from qcompiler.passes.rounded_weight import (
    Layer,
    RoundedWeight,
    by_data,
    finite_weight,
    layers_of,
)
from qcompiler.passes.second_moments import LayerRuns, Moments, Progress, Rows, Walker
from qcompiler.passes.weight_grid import rounded_on, weight_grid

__all__ = ["AWQ"]

_COLUMNS = 128
"""So many columns of a weight are enough to compare one exponent with another."""


@dataclasses.dataclass(frozen=True)
class _Site:
    """Products of one value.

    Attributes:
        data: What they read.
        layers: Their matrices.
        absorber: What can take the factors, or why nothing can.
    """

    data: ir.Value
    layers: Sequence[Layer]
    absorber: Absorber | str


@dataclasses.dataclass(frozen=True)
class _Found:
    """What the samples say of a site.

    Attributes:
        blocks: E[x xT] of inputs side by side, see `diagonal_blocks`.
        factors: t, [K].
        note: For people.
    """

    blocks: Rows
    factors: Rows
    note: str


class AWQ(ir.passes.InPlacePass):
    """Scale, and round, the matrices of planned MatMuls.

    Attributes:
        runs: How the model is run, and where layers are rounded side by side.
        options: What to try.
    """

    rounds = True

    @dataclasses.dataclass(frozen=True)
    class Options:
        """What to try.

        Attributes:
            alphas: How many exponents from 0 to below 1 are tried for each value; 1 scales nothing.
        """

        alphas: int = 20

        def __post_init__(self) -> None:
            """Check the values.

            Raises:
                OptionError: No exponent to try.
            """
            if self.alphas < 1:
                raise OptionError(f"alphas must be 1 or more, not {self.alphas}")

    def __init__(self, runs: LayerRuns | None = None, options: Options | None = None) -> None:
        super().__init__()
        self.runs, self.options = runs or LayerRuns(), options or self.Options()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Scale and round every planned matrix.

        Raises:
            CalibrationError: There are no samples, or one is not finite somewhere inside.
            ModelError: A weight holds NaN or Inf.
        """
        layers = layers_of(model.graph, "awq", "awq_gptq")
        if not layers:
            return ir.passes.PassResult(model, False)
        walk = self.runs.walker_for(layers, "awq scales")
        sites = [
            _Site(data, readers, _absorber(data, readers))
            for data, readers in by_data(layers).items()
        ]
        # The model stays as it is while it runs: a factor changes what goes into later layers.
        tell = self.runs.progress(len(sites) + len(layers_of(model.graph, "awq")))
        found = self._look(model, layers, sites, walk, tell)
        for site, facts in zip(sites, found, strict=True):
            _scale(model.graph, site, facts)
        facts_of = {id(site.data): facts for site, facts in zip(sites, found, strict=True)}
        self._round(model, facts_of, tell)
        FixNames()(model)
        return ir.passes.PassResult(model, True)

    def _round(self, model: ir.Model, facts_of: Mapping[int, _Found], tell: Progress) -> None:
        """Round what gptq will not, by what the samples say of each input."""
        done = itertools.count(len(facts_of) + 1)
        for data, group in by_data(layers_of(model.graph, "awq")).items():
            if id(data) not in facts_of:
                raise _rounded_in_two_ways(group[0])
            blocks = _scaled_blocks(facts_of[id(data)])
            work, method = partial(_round_one, blocks=blocks), ("awq rounds", "")
            for layer in rounded_or_kept(group, self.runs, method, work, blocks):
                layer.place(model.graph, tell, next(done))

    def _look(
        self,
        model: ir.Model,
        layers: Sequence[Layer],
        sites: Sequence[_Site],
        walk: Walker,
        tell: Progress,
    ) -> list[_Found]:
        """Run the model once, and choose the factors of each site."""
        found = list[_Found]()
        with walk(model, [site.data for site in sites]) as running:
            cache = LayerCache("awq", running.digest, repr(self.options), layers)
            tell(f"inputs: {cache.found([site.data.name or '' for site in sites])}", 0)
            for done, site in enumerate(sites, 1):
                name = site.data.name or ""
                kept, unkept = cache.get(name), ""
                if kept is None:
                    depth = len(constant(site.layers[0].weight))  # type: ignore[arg-type]
                    facts = self._choose(site, Moments.of(running.rows(site.data), depth, name))
                    unkept = cache.put(name, {"blocks": facts.blocks, "factors": facts.factors,
                                              "note": np.asarray(facts.note)})  # fmt: skip
                else:
                    facts = _Found(kept["blocks"], kept["factors"], str(kept["note"]))
                tell(f"{name}: {facts.note}{unkept}", done, kept=kept is not None)
                found.append(facts)
        return found

    def _choose(self, site: _Site, moments: Moments) -> _Found:
        """The factors of the least error."""
        blocks = diagonal_blocks(moments.second)
        ones = np.ones_like(moments.magnitude)
        if not moments.count:
            return _Found(blocks, ones, "not scaled by awq: no sample reaches it")
        if isinstance(site.absorber, str):
            return _Found(blocks, ones, f"not scaled by awq: {site.absorber}")
        weights = [_some_columns(layer) for layer in site.layers]
        best, least, first = (0.0, ones), np.inf, 0.0
        for alpha in np.arange(self.options.alphas) / self.options.alphas:
            factors = site.absorber.tie(_factors(moments.magnitude, alpha))
            error = sum(
                _error(weight, layer, factors, moments)
                for weight, layer in zip(weights, site.layers, strict=True)
            )
            first = first or error
            if error < least:
                best, least = (float(alpha), factors), error
        if (best[1] == 1).all():
            return _Found(blocks, ones, "not scaled by awq: no exponent is better than 0")
        gain = 10 * np.log10(max(first, 1e-30) / max(least, 1e-30))
        return _Found(
            blocks, best[1], f"scaled by awq with alpha={best[0]:g}, {gain:.1f} dB better"
        )


def _absorber(data: ir.Value, layers: Sequence[Layer]) -> Absorber | str:
    """What takes the factors of a value that only these layers read."""
    nodes = {node for layer in layers for node in layer.nodes}
    if {use.node for use in data.uses()} != nodes or data.is_graph_output():
        return f"{data.name} has other readers, or its weights have"
    return absorber_of(data)


def _some_columns(layer: Layer) -> Rows:
    array = finite_weight(layer.nodes[0], layer.weight)
    columns = array[:, :: -(-array.shape[1] // _COLUMNS)].copy()
    let_go(layer.weight)
    return columns


def _factors(magnitude: Rows, alpha: float) -> Rows:
    if not magnitude.any():
        return np.ones_like(magnitude)
    floor = magnitude[magnitude > 0].min()
    factors = np.maximum(magnitude, floor).astype(np.float64) ** alpha
    return np.asarray(factors / np.sqrt(factors.max() * factors.min()), np.float32)


def _rounded_in_two_ways(layer: Layer) -> OptionError:
    return OptionError(
        f"{layer.name}: others that read its weight {layer.weight.name!r} round it by awq_gptq; "
        "give all of them one rounding"
    )


def _round_one(weight: Rows, type: QuantType, blocks: Rows) -> tuple[RoundedWeight, str]:
    """A scaled weight on scales that cut its ranges where that lowers the error."""
    if not blocks.any():
        nearest = rounded_on(weight, type, weight_grid(weight, type, "max"))
        return nearest, "rounded to nearest: on all samples what goes into it is 0 or nothing"
    rounded = rounded_on(weight, type, searched_grid(weight, type, blocks))
    error = error_in_blocks(weight - rounded.floats(type), blocks)
    good = decibels(error_in_blocks(weight, blocks), error)
    return rounded, f"rounded by awq to {good}, of {BLOCK} inputs at a time"


def _scaled_blocks(facts: _Found) -> Rows:
    """The moments of what goes into the scaled weight."""
    by = np.ones((len(facts.blocks), BLOCK), np.float32)
    by.reshape(-1)[: len(facts.factors)] = 1 / facts.factors
    return np.asarray(facts.blocks * by[:, :, None] * by[:, None, :], np.float32)


def _error(weight: Rows, layer: Layer, factors: Rows, moments: Moments) -> float:
    """The error of a product with some columns of its weight, a part of all that it makes."""
    scaled = weight * factors[:, None]
    # The whole range: to look for the best part of it takes ten times as long.
    rounded = rounded_on(scaled, layer.type, weight_grid(scaled, layer.type, "max"))
    difference = rounded.floats(layer.type) / factors[:, None] - weight
    return moments.error(difference) / max(moments.error(weight), 1e-30)


def _scale(graph: ir.Graph, site: _Site, facts: _Found) -> None:
    """Make the edit, and say so at the products."""
    if isinstance(site.absorber, Absorber) and (facts.factors != 1).any():
        site.absorber.divide(graph, facts.factors)
        for layer in site.layers:
            scale_constant(graph, layer.nodes, 1, facts.factors[:, None])
    for layer in site.layers:
        for node in layer.nodes:
            add_note(node, facts.note)
