"""The values that planned MatMuls quantize, and some of their tokens.

Passes look at all products that read one value together, because it is quantized once for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.decisions import NodePlan, add_note, plan_of
from qcompiler.ir.graph import constant
from qcompiler.ir.on_disk import let_go
from qcompiler.passes.known_ranges import KnownRanges
from qcompiler.passes.match_norms import Norm, match_norm

__all__ = ["Products", "Rows", "Sampler", "is_norm", "sampled_products"]

Rows = NDArray[np.float32]

Sampler = Callable[[ir.Model, Sequence[str]], Mapping[str, Rows]]
"""Runs the model and returns some tokens of the named tensors, [tokens, K] each; a tensor that it
could not compute is left out."""

_COLUMNS = 256
"""So many columns of all the weights are enough to compare one error with another."""

_FEWEST = 8
"""Made-up tokens that tell channels apart: the largest of each over one of them is chance."""


@dataclasses.dataclass(frozen=True)
class Products:
    """The planned MatMuls that multiply the tokens of one value, and quantize them.

    Attributes:
        value: What they read on their left.
        nodes: The MatMuls.
    """

    value: ir.Value
    nodes: list[ir.Node]

    def weights(self) -> dict[NodePlan, Rows]:
        """For each plan columns of the weights that have it side by side, [K, N]."""
        parts: dict[NodePlan, list[Rows]] = {}
        share = max(1, _COLUMNS // len(self.nodes))
        for node in self.nodes:
            plan, weight = plan_of(node), node.inputs[1]
            array = constant(weight)
            assert plan is not None and weight is not None and array is not None
            part = np.asarray(array[:, :: -(-array.shape[1] // share)], np.float32)
            with np.errstate(invalid="ignore"):  # Inf is told of where the weight is rounded
                part = part / max(float(np.linalg.norm(part)), 1e-30)
            let_go(weight)  # columns lie on all of its pages, and those of all layers are the model
            parts.setdefault(plan, []).append(part)
        return {plan: np.concatenate(columns, axis=1) for plan, columns in parts.items()}

    def note(self, text: str) -> None:
        """Add to the reason of each product."""
        for node in self.nodes:
            add_note(node, text)


def _planned_products(model: ir.Model) -> list[Products]:
    """The values of the main graph that planned MatMuls quantize, in order."""
    found: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        plan = plan_of(node)
        if node.op_type != "MatMul" or plan is None or plan.activation is None:
            continue
        data, weight = node.inputs
        array = constant(weight)
        # A model whose sizes do not fit is for ONNX Runtime to refuse.
        if data is not None and array is not None and _fits(data, len(array)):
            found.setdefault(data, []).append(node)
    return [Products(value, nodes) for value, nodes in found.items()]


@contextlib.contextmanager
def sampled_products(
    model: ir.Model, sample: Sampler, what: str, *, made_up: bool, ranges: KnownRanges | None
) -> Iterator[Iterator[tuple[Products, Rows]]]:
    """The values that planned MatMuls quantize, and tokens of each, to be changed in the block.

    Args:
        model: May be changed, in the order of the values.
        sample: Where tokens come from.
        what: The change, as in the note on values of which there are no tokens; products that were
            asked about for one change are not asked about again.
        made_up: Whether nobody gave the tokens: of a model that reads floats, norms alone count.
        ranges: Told of the changes, after which a tensor that kept its name has the same numbers.
    """
    known = ranges is not None and ranges.are_of(model)
    sites = [s for s in _planned_products(model) if any(what not in n.meta for n in s.nodes)]
    if made_up and _reads_floats(model):
        sites = [site for site in sites if is_norm(site.value)]
    tokens = sample(model, [site.value.name or "" for site in sites]) if sites else {}
    yield _with_tokens(sites, tokens, what, _FEWEST if made_up else 1)
    if known and ranges is not None:
        ranges.hold_for(model)


def _with_tokens(
    sites: Sequence[Products], tokens: Mapping[str, Rows], what: str, fewest: int
) -> Iterator[tuple[Products, Rows]]:
    for site in sites:
        rows = tokens.get(site.value.name or "")
        if rows is None:
            site.note(f"{what}: no samples to run the model on")
        elif len(rows) < fewest:
            site.note(f"{what}: {len(rows)} made-up tokens tell nothing of others")
        else:
            yield site, rows
        for node in site.nodes:
            node.meta[what] = True


def _reads_floats(model: ir.Model) -> bool:
    """Whether inputs made up for a model are numbers of no meaning, not indices."""
    return any(v.dtype is not None and v.dtype.is_floating_point() for v in model.graph.inputs)


def is_norm(value: ir.Value) -> bool:
    """Whether a norm makes the value: of made-up inputs, too, it has the outliers of real ones."""
    producer = value.producer()
    return producer is not None and isinstance(match_norm(producer), Norm)


def _fits(value: ir.Value, size: int) -> bool:
    """Whether the last axis of a value may have so many elements."""
    last = value.shape[-1] if value.shape else None
    return not isinstance(last, int) or last == size
