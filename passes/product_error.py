"""What rounding costs the products that read one value, found on some of its tokens.

    error = sum over the products of |Q(x) Q(W) - x W|^2 / |W|^2

as they are planned, each weight as important as the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.arithmetic import dequantize, quantize, scale_and_zero_point, weight_scale
from qcompiler.ir.decisions import NodePlan, add_note, plan_of
from qcompiler.ir.graph import constant
from qcompiler.ir.types import PerAxis, PerGroup, QuantType
from qcompiler.passes.known_ranges import KnownRanges
from qcompiler.passes.match_norms import Norm, match_norm
from qcompiler.passes.weight_grid import rounded_on, weight_grid

__all__ = [
    "Products",
    "Rows",
    "Sampler",
    "exact_products",
    "is_norm",
    "rounding_error",
    "rounding_errors",
    "sampled_products",
]

Rows = NDArray[np.float32]

Sampler = Callable[[ir.Model, Sequence[str]], Mapping[str, Rows]]
"""Runs the model and returns some tokens of the named tensors, [tokens, K] each; a tensor that it
could not compute is left out."""

_COLUMNS = 256
"""So many columns of all the weights are enough to compare one error with another."""

_AT_ONCE = 1 << 17
"""Elements that numpy rounds in one call where there are few: each call costs some microseconds,
which thousands of small products add up to seconds."""


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
            plan, array = plan_of(node), constant(node.inputs[1])
            assert plan is not None and array is not None
            part = np.asarray(array[:, :: -(-array.shape[1] // share)], np.float32)
            with np.errstate(invalid="ignore"):  # Inf is told of where the weight is rounded
                part = part / max(float(np.linalg.norm(part)), 1e-30)
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


def sampled_products(
    model: ir.Model, sample: Sampler, what: str, *, made_up: bool, ranges: KnownRanges | None
) -> Iterator[tuple[Products, Rows]]:
    """The values that planned MatMuls quantize, and tokens of each, to be changed one by one.

    Args:
        model: May be changed between one and the next.
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
    names = [site.value.name or "" for site in sites]
    tokens = sample(model, names) if sites else {}
    for name, site in zip(names, sites, strict=True):
        if name in tokens:
            yield site, tokens[name]
        else:
            site.note(f"{what}: no samples to run the model on")
        for node in site.nodes:
            node.meta[what] = True
    if known and ranges is not None:
        ranges.hold_for(model)


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


def exact_products(tokens: Rows, weights: Mapping[NodePlan, Rows]) -> dict[NodePlan, Rows]:
    """What `rounding_error` compares with."""
    with np.errstate(over="ignore", invalid="ignore"):
        return {plan: tokens @ weight for plan, weight in weights.items()}


def rounding_error(
    tokens: Rows,
    weights: Mapping[NodePlan, Rows],
    exact: Mapping[NodePlan, Rows] | None = None,
) -> float:
    """The error of the products of `tokens`, [tokens, K], by `weights`, as planned.

    `exact` is what they should be, where that is known.
    """
    total = 0.0
    exact = exact_products(tokens, weights) if exact is None else exact
    # Weights that are not finite are refused by the pass that rounds them.
    with np.errstate(over="ignore", invalid="ignore"):
        for plan, weight in weights.items():
            assert plan.activation is not None
            rounded = _rounded(tokens, plan.activation.type) @ _rounded(weight, plan.weight)
            total += float(np.square(rounded - exact[plan]).sum())
    return total


def rounding_errors(
    tokens: Rows,
    weights: Mapping[NodePlan, Rows],
    factors: Sequence[Rows],
    exact: Mapping[NodePlan, Rows],
) -> list[float]:
    """`rounding_error` of `tokens / f` by `weights * f`, for each f, [K], of some factors."""
    many = 1
    if all(_is_by_rows_and_columns(plan) for plan in weights):
        many = max(1, _AT_ONCE // max(tokens.size, *(part.size for part in weights.values()), 1))
    errors: list[float] = []
    for start in range(0, len(factors), many):
        errors += _errors_at_once(tokens, weights, np.stack(factors[start : start + many]), exact)
    return errors


def _errors_at_once(
    tokens: Rows, weights: Mapping[NodePlan, Rows], factors: Rows, exact: Mapping[NodePlan, Rows]
) -> list[float]:
    """For factors [A, K]: tokens one below the other, weights side by side."""
    many, depth = factors.shape
    total = np.zeros(many)
    with np.errstate(over="ignore", invalid="ignore"):
        rows = (tokens / factors[:, None]).reshape(-1, depth)
        for plan, weight in weights.items():
            assert plan.activation is not None
            columns = (weight[:, None] * factors.T[:, :, None]).reshape(depth, -1)
            left = _rounded(rows, plan.activation.type).reshape(many, -1, depth)
            right = _rounded(columns, plan.weight).reshape(depth, many, -1).transpose(1, 0, 2)
            total += np.square(left @ right - exact[plan]).sum(axis=(1, 2))
    return [float(error) for error in total]


def _is_by_rows_and_columns(plan: NodePlan) -> bool:
    """Whether each token and each column of the weight is rounded by itself."""
    assert plan.activation is not None
    tokens, weight = plan.activation.type.granularity, plan.weight.granularity
    by_rows = isinstance(tokens, PerGroup) and tokens.axis in (1, -1)
    by_columns = weight in (PerAxis(1), PerAxis(-1)) or (
        isinstance(weight, PerGroup) and weight.axis in (0, -2)
    )
    return by_rows and by_columns and not plan.weight.two_level


def _rounded(values: Rows, type: QuantType) -> Rows:
    if type.offset:
        return rounded_on(values, type, weight_grid(values, type, "max")).floats(type)
    if type.symmetric:  # what is not finite then gives NaN, and no error here
        scale = weight_scale(values, type)
        return dequantize(quantize(values, scale, type), scale, type)
    scale, zero = scale_and_zero_point(values, type)
    return dequantize(quantize(values, scale, type, zero), scale, type, zero)
