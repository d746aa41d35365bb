"""Move the outliers of a norm's result from the activations into the weights that multiply it.

1. y = Norm(x);  MatMul(y, W)...   =>   z = Mul(y, 1 / t);  MatMul(z, t W)...      t per channel
2. the same without the Mul, 1 / t taken into gamma and beta, where nothing else reads y

for all the MatMuls that are to quantize y per token.  One channel of large values makes the step of
its whole token coarse; a weight has a step per column and loses little by a larger row (Xiao et
al., SmoothQuant, 2023).  With `m` the largest magnitude of each channel over some tokens,

    t = max(1, 2 ^ round(alpha log2(m / median m)))

and alpha is what quantizes those tokens' products best.  Powers of two make both products exact, so
that the float model's results stay the same bits; t is never below 1, so that no token's step grows
whatever the tokens were.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.arithmetic import dequantize, quantize, weight_scale
from qcompiler.ir.decisions import NodePlan, add_note, note_of, plan_of
from qcompiler.ir.errors import OptionError
from qcompiler.ir.graph import constant, drop_if_unread, new_initializer, place_after
from qcompiler.ir.types import PerGroup, QuantType
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.match_norms import Norm, match_norm

__all__ = ["Sampler", "SmoothActivations"]

Rows = NDArray[np.float32]

Sampler = Callable[[ir.Model, Sequence[str]], Mapping[str, Rows]]
"""Runs the model and returns some tokens of the named tensors, [tokens, K] each; a tensor that it
could not compute is left out."""

_COLUMNS = 512
"""So many columns of a weight are enough to compare one alpha with another."""


@dataclasses.dataclass(frozen=True)
class _Site:
    """A norm and the planned MatMuls that read its result."""

    norm: Norm
    readers: list[ir.Node]


class SmoothActivations(ir.passes.InPlacePass):
    """Divide the outlying channels of norms, and multiply the weights that read them.

    Attributes:
        sample: Where tokens come from.
        options: How much to smooth.
    """

    @dataclasses.dataclass(frozen=True)
    class Options:
        """How much to smooth.

        Attributes:
            alpha: Exponents to try for each norm: 0 leaves all in the activations, 1 moves it all.
            worth: The error must fall below this part of what it was. The tokens may be made up,
                and real ones have other outliers; where these matter (MiniLM) it falls to a half,
                where not (Whisper) to 0.8.
        """

        alpha: tuple[float, ...] = (0.25, 0.375, 0.5, 0.625, 0.75)
        worth: float = 0.75

        def __post_init__(self) -> None:
            """Check the values.

            Raises:
                OptionError: No exponent or one outside 0 to 1, or a part that is not above 0.
            """
            if not self.alpha or not all(0 <= alpha <= 1 for alpha in self.alpha):
                raise OptionError(f"alpha must be numbers from 0 to 1, not {self.alpha}")
            if not self.worth > 0:
                raise OptionError(f"worth must be above 0, not {self.worth:g}")

    def __init__(self, sample: Sampler, options: Options | None = None) -> None:
        super().__init__()
        self.sample, self.options = sample, options or self.Options()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Smooth every norm of the main graph where that pays."""
        sites = [site for node in model.graph if (site := _site(node)) is not None]
        names = [site.norm.result.name or "" for site in sites]
        tokens = self.sample(model, names) if sites else {}
        smoothed = 0
        for name, site in zip(names, sites, strict=True):
            if name not in tokens:
                _note(site, "activations not smoothed: no samples to run the model on")
                continue
            alpha = self._best_alpha(tokens[name], site)
            if alpha:
                _smooth(model.graph, site, _factors(tokens[name], alpha))
                _note(site, f"activations smoothed with alpha={alpha:g}")
                smoothed += 1
        if smoothed:
            FixNames()(model)
        return ir.passes.PassResult(model, smoothed > 0)

    def _best_alpha(self, tokens: Rows, site: _Site) -> float:
        """The alpha of the least error, 0 if none is worth it."""
        # Weights that are not finite are refused by the pass that rounds them.
        with np.errstate(over="ignore", invalid="ignore"):
            weights, plan = _all_weights(site), _plan(site.readers[0])
            exact = tokens @ weights
            errors = {
                alpha: np.square(_product(tokens, weights, _factors(tokens, alpha), plan) - exact)
                for alpha in (0.0, *self.options.alpha)
            }
            energy = {alpha: float(error.sum()) for alpha, error in errors.items()}
        best = min(energy, key=energy.__getitem__)
        return best if energy[best] < self.options.worth * energy[0.0] else 0.0


def _site(node: ir.Node) -> _Site | None:
    norm = match_norm(node)
    if not isinstance(norm, Norm):
        return None
    readers = [use.node for use in norm.result.uses() if use.idx == 0 and _is_per_token(use.node)]
    return _Site(norm, readers) if readers else None


def _is_per_token(node: ir.Node) -> bool:
    """Whether `node` quantizes its tokens, and was not looked at before."""
    plan = plan_of(node)
    if node.op_type != "MatMul" or plan is None or plan.activation is None:
        return False
    looked_at = "smoothed" in (note_of(node) or "")
    return isinstance(plan.activation.type.granularity, PerGroup) and not looked_at


def _factors(tokens: Rows, alpha: float) -> Rows:
    """T: how much smaller each channel becomes, [K]."""
    largest = np.abs(tokens).max(axis=0)
    middle = np.median(largest)
    if not middle:
        return np.ones_like(largest)
    steps = np.rint(alpha * np.log2(np.maximum(largest / middle, 1.0)))
    return np.asarray(np.exp2(steps), np.float32)


def _all_weights(site: _Site) -> Rows:
    """Columns of all the weights side by side, [K, N], each weight as large as the others."""
    parts = []
    for node in site.readers:
        weight = _weight(node)
        part = weight[:, :: -(-weight.shape[1] // _COLUMNS)]
        parts.append(part / max(float(np.linalg.norm(part)), 1e-30))
    return np.concatenate(parts, axis=1)


def _product(tokens: Rows, weights: Rows, factors: Rows, plan: NodePlan) -> Rows:
    """What the quantized product will be, [tokens, N]."""
    assert plan.activation is not None
    left = _rounded(tokens / factors, plan.activation.type)
    return left @ _rounded(weights * factors[:, None], plan.weight)


def _rounded(values: Rows, type: QuantType) -> Rows:
    scale = weight_scale(values, type)
    return dequantize(quantize(values, scale, type), scale, type)


def _weight(node: ir.Node) -> Rows:
    array = constant(node.inputs[1])
    assert array is not None
    return np.asarray(array, np.float32)


def _plan(node: ir.Node) -> NodePlan:
    plan = plan_of(node)
    assert plan is not None and plan.activation is not None
    return plan


def _note(site: _Site, text: str) -> None:
    for node in site.readers:
        add_note(node, text)


def _smooth(graph: ir.Graph, site: _Site, factors: Rows) -> None:
    """Make the edit, at the norm and at each of its readers."""
    result, inverse = site.norm.result, np.reciprocal(factors)
    readers = {use.node for use in result.uses()}
    if readers == set(site.readers) and not result.is_graph_output():
        for parameter in (site.norm.gamma, site.norm.beta):
            if parameter is not None:
                _scale(graph, parameter, [site.norm.nodes[-1]], inverse)
    else:
        _insert_mul(graph, site, inverse)
    for weight in dict.fromkeys(node.inputs[1] for node in site.readers):
        assert weight is not None
        _scale(graph, weight, site.readers, factors[:, None])


def _insert_mul(graph: ir.Graph, site: _Site, inverse: Rows) -> None:
    result = site.norm.result
    operand = new_initializer(graph, f"{result.name}_smoothing", inverse)
    product = ir.node("Mul", [result, operand], name=f"{result.name}_smooth")
    smoothed = product.outputs[0]
    smoothed.name = f"{result.name}_smoothed"
    smoothed.type, smoothed.shape = result.type, result.shape
    place_after(result, [product])
    for node in site.readers:
        node.replace_input_with(0, smoothed)


def _scale(graph: ir.Graph, parameter: ir.Value, readers: Sequence[ir.Node], factors: Rows) -> None:
    """Let these readers of a constant read its product with `factors`; others keep the constant."""
    array = np.asarray(constant(parameter), np.float32)
    scaled = new_initializer(graph, f"{parameter.name}_smoothed", array * factors)
    for node in readers:
        for index, value in enumerate(node.inputs):
            if value is parameter:
                node.replace_input_with(index, scaled)
    drop_if_unread(parameter)
