"""What rounding costs the products that read one value, found on some of its tokens.

    error = sum over the products of |Q(x) Q(W) - x W|^2 / |W|^2

as they are planned, each weight as important as the others.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from qcompiler.ir.arithmetic import fake_quantize, scale_and_zero_point, weight_scale
from qcompiler.ir.decisions import NodePlan
from qcompiler.ir.types import PerAxis, PerGroup, QuantType
from qcompiler.passes.planned_products import Rows
from qcompiler.passes.weight_grid import rounded_on, weight_grid

__all__ = ["AT_ONCE", "Trial", "rounding_error", "rounding_errors"]

AT_ONCE = 1 << 17
"""Elements that numpy rounds in one call where there are few: each call costs some microseconds,
which thousands of small products add up to seconds."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """Products to round with channels of their operands scaled in several ways.

    Attributes:
        tokens: The left operand, [tokens, K].
        weights: Columns of the right ones, [K, N], by plan.
        factors: What tokens are divided by, and weights multiplied, each [K].
    """

    tokens: Rows
    weights: Mapping[NodePlan, Rows]
    factors: Sequence[Rows]

    @functools.cached_property
    def exact(self) -> Sequence[Rows]:
        """What they are without rounding, however their operands are scaled; in order."""
        return _exact_products(self.tokens, self.weights.values())

    @functools.cached_property
    def parts(self) -> Sequence[Rows]:
        """The weights in order: to look a plan up takes as long as to round a small one."""
        return list(self.weights.values())

    @functools.cached_property
    def size(self) -> int:
        """Elements of the largest operand."""
        return max(part.size for part in [self.tokens, *self.weights.values()])

    @functools.cached_property
    def kind(self) -> tuple[object, ...]:
        """Equal for trials that can be rounded side by side."""
        weights = tuple((plan, part.shape) for plan, part in self.weights.items())
        alone = 0 if all(map(_is_by_rows_and_columns, self.weights)) else id(self)
        return self.tokens.shape, weights, alone


def _exact_products(tokens: Rows, weights: Iterable[Rows]) -> list[Rows]:
    """What products are without rounding."""
    with np.errstate(over="ignore", invalid="ignore"):
        return [tokens @ weight for weight in weights]


def rounding_error(tokens: Rows, weights: Mapping[NodePlan, Rows]) -> float:
    """The error of the products of `tokens`, [tokens, K], by `weights`, [K, N], as planned."""
    total, products = 0.0, _exact_products(tokens, weights.values())
    # Weights that are not finite are refused by the pass that rounds them.
    with np.errstate(over="ignore", invalid="ignore"):
        for (plan, weight), exact in zip(weights.items(), products, strict=True):
            assert plan.activation is not None
            rounded = _rounded(tokens, plan.activation.type) @ _rounded(weight, plan.weight)
            total += float(np.square(rounded - exact).sum())
    return total


def rounding_errors(trials: Sequence[Trial]) -> list[list[float]]:
    """For each trial and each of its factors, the `rounding_error` of tokens / f, weights * f."""
    errors: list[list[float]] = [[] for _ in trials]
    alike: dict[tuple[object, ...], list[int]] = {}
    for index, trial in enumerate(trials):
        alike.setdefault(trial.kind, []).append(index)
    for indices in alike.values():
        cases = [(index, factors) for index in indices for factors in trials[index].factors]
        first = trials[indices[0]]
        many = 1 if first.kind[-1] else max(1, AT_ONCE // max(first.size, 1))
        for start in range(0, len(cases), many):
            some = cases[start : start + many]
            found = _errors_at_once([(trials[index], factors) for index, factors in some])
            for (index, _), error in zip(some, found, strict=True):
                errors[index].append(error)
    return errors


def _errors_at_once(cases: Sequence[tuple[Trial, Rows]]) -> list[float]:
    """Of trials of one kind: tokens one below the other, weights side by side."""
    many, (tokens, depth) = len(cases), cases[0][0].tokens.shape
    total = np.zeros(many)
    with np.errstate(over="ignore", invalid="ignore"):
        rows = np.concatenate([trial.tokens / factors for trial, factors in cases])
        for place, plan in enumerate(cases[0][0].weights):
            assert plan.activation is not None
            columns = np.concatenate([t.parts[place] * f[:, None] for t, f in cases], axis=1)
            left = _rounded(rows, plan.activation.type).reshape(many, tokens, depth)
            right = _rounded(columns, plan.weight).reshape(depth, many, -1).transpose(1, 0, 2)
            exact = np.stack([trial.exact[place] for trial, _ in cases])
            total += np.square(left @ right - exact).sum(axis=(1, 2))
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
        return fake_quantize(values, scale, type)
    scale, zero = scale_and_zero_point(values, type)
    return fake_quantize(values, scale, type, zero)
