"""Multiply the few channels of outlying activations in float, beside the quantized product.

    y = MatMul(x, W)
        =>   y = Add(MatMul(Mul(x, inliers), W'), MatMul(Gather(x, outliers), W[outliers]))

for all the MatMuls that are to quantize x: `inliers` is 0 in the channels `outliers` and 1 in the
others, W' is W with rows of zeros there.  So a token's scale is the largest magnitude of its
inliers, a static range is that of the inliers, and the weight's steps are not wider for rows that
are not rounded (Dettmers et al., LLM.int8(), 2022; its outliers are looked for at every run).
Clipping the outliers instead would make one scale of all tokens: 27 dB against 39, measured on
normal tokens with 0.5% of the channels 50 times as large.

The order of the terms alone changes in the float model.  The Mul is what a norm's kernel does for
nothing (`fuse_norms`), and is joined with one that is there; the Add goes into the epilogue of the
quantized product.  A channel is outlying for all tokens, as they are in transformers.
"""

from __future__ import annotations

import bisect
import dataclasses

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.decisions import decide
from qcompiler.ir.errors import OptionError
from qcompiler.ir.graph import constant, drop_if_unread, new_initializer, place_after
from qcompiler.ir.on_disk import let_go
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.known_ranges import KnownRanges
from qcompiler.passes.known_rows import KnownRows
from qcompiler.passes.planned_products import Products, Rows, Sampler, sampled_products
from qcompiler.passes.product_error import rounding_error

__all__ = ["SplitOutliers"]

_NOT = "outliers not split off"

_NEARLY = 0.1
"""Channels that bring the error down by less than this part of it, all together, stay."""


class SplitOutliers(ir.passes.InPlacePass):
    """Give outlying channels a float product of their own.

    Attributes:
        sample: Where tokens come from.
        options: Which channels, and where that pays.
        made_up: Whether nobody gave the tokens, see `SmoothActivations`.
        ranges: What is known of ranges, most of which hold after the change, too.
    """

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Which channels are multiplied in float, and where.

        Attributes:
            when: "auto": where the error of some tokens falls below `worth` of what it was;
                "on": wherever it falls at all; "off": nowhere.
            threshold: How many times as large as the median channel an outlying one is; by default
                the largest are, as few as bring the error about as far down as `most` of them.
            most: The largest part of the channels.
            worth: See `when`. A quarter is 6 dB: for less, the product that is added, and siblings
                that stay apart because of it, are not worth their time.
        """

        when: str = "auto"
        threshold: float | None = None
        most: float = 0.01
        worth: float = 0.25

        def __post_init__(self) -> None:
            """Check the values.

            Raises:
                OptionError: One is out of its range.
            """
            if self.when not in ("auto", "on", "off"):
                raise OptionError(f"when must be auto, on or off, not {self.when!r}")
            if self.threshold is not None and not self.threshold > 1:
                raise OptionError(f"threshold must be above 1, not {self.threshold:g}")
            if not 0 < self.most < 1:
                raise OptionError(f"most must lie between 0 and 1, not {self.most:g}")
            if not self.worth > 0:
                raise OptionError(f"worth must be above 0, not {self.worth:g}")

    def __init__(
        self,
        sample: Sampler,
        options: Options | None = None,
        *,
        made_up: bool = False,
        ranges: KnownRanges | None = None,
    ) -> None:
        super().__init__()
        self.sample, self.options, self.made_up = sample, options or self.Options(), made_up
        self.ranges = ranges

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Split the products of every value of the main graph where that pays."""
        if self.options.when == "off":
            if isinstance(self.sample, KnownRows):
                self.sample.forget()
            return ir.passes.PassResult(model, False)
        split = 0
        with sampled_products(
            model, self.sample, _NOT, made_up=self.made_up, ranges=self.ranges
        ) as sites:
            for site, tokens in sites:
                split += self._try_split(model.graph, site, tokens)
        if split:
            FixNames()(model)
        return ir.passes.PassResult(model, split > 0)

    def _try_split(self, graph: ir.Graph, site: Products, tokens: Rows) -> bool:
        """Split the products of one value if that pays."""
        largest = np.abs(tokens).max(axis=0)
        order = np.argsort(-largest, kind="stable")
        count, left = self._count(site, tokens, order, largest)
        if not count:
            return False
        _split(graph, site, np.sort(order[:count]))
        many = f"{count} of {len(order)} channels multiplied in float"
        site.note(f"{many}, which leaves {left:.2g} of the error")
        return True

    def _count(
        self, site: Products, tokens: Rows, order: NDArray[np.intp], largest: Rows
    ) -> tuple[int, float]:
        """How many channels to split off, the first in `order`, and what that leaves of the error.

        0 where it does not pay.
        """
        columns = site.weights()
        before = rounding_error(tokens, columns)

        def left(count: int) -> float:
            inliers = _inliers(order[:count], len(order))
            weights = {plan: part * inliers[:, None] for plan, part in columns.items()}
            return rounding_error(tokens * inliers, weights) / before

        limit = max(1, int(self.options.most * len(order)))
        if self.options.threshold is not None:
            outlying = int((largest > self.options.threshold * np.median(largest)).sum())
            limit = min(limit, outlying)
        if not 0 < before < np.inf or not limit or len(order) == 1:
            return 0, 1.0
        least, worth = left(limit), self.options.worth if self.options.when == "auto" else 1.0
        if not least < worth:
            return 0, 1.0
        if self.options.threshold is not None:
            return limit, least
        bound = min(least + _NEARLY, worth)
        count = 1 + bisect.bisect_left(range(1, limit), True, key=lambda n: left(n) < bound)
        return count, left(count)


def _inliers(outliers: NDArray[np.intp], depth: int) -> Rows:
    vector = np.ones(depth, np.float32)
    vector[outliers] = 0
    return vector


def _split(graph: ir.Graph, site: Products, outliers: NDArray[np.intp]) -> None:
    """Make the edit, at the value and at each of its readers."""
    value, factors = _unscaled(site)
    name, depth = site.value.name, len(factors)
    mask = new_initializer(graph, f"{name}_inliers", factors * _inliers(outliers, depth))
    index = new_initializer(graph, f"{name}_outliers", outliers.astype(np.int64))
    quiet = ir.node("Mul", [value, mask], name=f"{name}_without_outliers")
    loud = ir.node("Gather", [value, index], {"axis": -1}, name=f"{name}_only_outliers")
    _type(quiet, site.value.shape, depth)
    _type(loud, site.value.shape, len(outliers))
    place_after(value, [quiet, loud])
    decide(loud, "float", "channels that are multiplied in float")
    parts: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    for node in site.nodes:
        weight = node.inputs[1]
        assert weight is not None
        if weight not in parts:
            array = np.asarray(constant(weight))
            inner = array * _inliers(outliers, depth)[:, None]
            rows = array[outliers] * factors[outliers, None]
            parts[weight] = (
                new_initializer(graph, f"{weight.name}_inliers", inner),
                new_initializer(graph, f"{weight.name}_outliers", rows),
            )
            let_go(weight)
        _split_product(node, quiet.outputs[0], loud.outputs[0], *parts[weight])
        drop_if_unread(weight)
    if value is not site.value and (scaled := site.value.producer()) is not None:
        graph.remove(scaled, safe=True)


def _unscaled(site: Products) -> tuple[ir.Value, Rows]:
    """The value before a Mul by one constant per channel that only these products read, and it."""
    producer, value = site.value.producer(), site.value
    depth = len(np.asarray(constant(site.nodes[0].inputs[1])))
    readers = {use.node for use in value.uses()}
    if producer is not None and producer.op_type == "Mul" and producer.domain == "":
        for data, factor in (producer.inputs, reversed(producer.inputs)):
            array = constant(factor)
            whole = readers == set(site.nodes) and not value.is_graph_output()
            if data is not None and whole and array is not None and array.shape == (depth,):
                return data, array
    return value, np.ones(depth, np.float32)


def _split_product(
    node: ir.Node, quiet: ir.Value, loud: ir.Value, inner: ir.Value, rows: ir.Value
) -> None:
    """Let a MatMul multiply the inliers, and add the float product of the outliers."""
    assert node.graph is not None
    result = node.outputs[0]
    name = result.name
    aside = ir.node("MatMul", [loud, rows], name=f"{node.name}_outliers")
    both = ir.node("Add", [result, aside.outputs[0]], name=f"{node.name}_join")
    for new in (aside, both):
        new.outputs[0].type, new.outputs[0].shape = result.type, result.shape
    ir.convenience.replace_all_uses_with(result, both.outputs[0], replace_graph_outputs=True)
    both.replace_input_with(0, result)
    result.name, aside.outputs[0].name = f"{name}_inliers", f"{name}_outliers"
    both.outputs[0].name = name
    node.graph.insert_after(node, [aside, both])
    node.replace_input_with(0, quiet)
    node.replace_input_with(1, inner)
    decide(aside, "float", "multiplies the outlying channels")


def _type(node: ir.Node, shape: ir.Shape | None, size: int) -> None:
    result = node.outputs[0]
    result.name, result.dtype = node.name, ir.DataType.FLOAT
    result.shape = None if shape is None else ir.Shape([*shape.dims[:-1], size])
