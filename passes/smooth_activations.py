"""Move the outliers of activations into the weights that multiply them.

1. y = f(x, c);  MatMul(y, W)...   =>   y' = f(x, c / t);  MatMul(y', t W)...      t per channel
2. y = g(x);     MatMul(y, W)...   =>   z = Mul(y, 1 / t);  MatMul(z, t W)...

for all the MatMuls that are to quantize y.  In 1, c are the constants that `absorb_factors` finds:
parameters of a norm, columns of a Linear before, through attention and its grouped heads, through
one factor of a gate.  In 2 there are none (no factor passes GELU), or others read y.  A norm's
kernel does that Mul for nothing, and so does a product's after its GELU; elsewhere it is a node.
One channel of large values makes the step of its whole token (of all tokens, where the scale is
static) coarse; a weight has a step per column and loses little by a larger row (Xiao et al.,
SmoothQuant, 2023).  With `m` the largest magnitude of each channel over some tokens,

    t = max(1, 2 ^ round(alpha log2(m / median m)))

and alpha is what quantizes those tokens' products best.  Powers of two make both products exact, so
that the float model's results stay the same bits; t is never below 1, so that no step grows
whatever the tokens were.  It is a float model again: a static range is observed of y' itself.

Products that share a weight (ALBERT's layers are one) share t, found on the tokens of all.  A copy
of the weight for each would undo what sharing saves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.ir.decisions import plan_of
from qcompiler.ir.errors import OptionError
from qcompiler.ir.graph import new_initializer, place_after
from qcompiler.passes.absorb_factors import Absorber, absorber_of, scale_constant
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.known_ranges import KnownRanges
from qcompiler.passes.known_rows import KnownRows
from qcompiler.passes.planned_products import Products, Rows, Sampler, is_norm, sampled_products
from qcompiler.passes.product_error import AT_ONCE, Trial, rounding_errors
from qcompiler.passes.shared_weights import by_weights

__all__ = ["SmoothActivations"]

_NOT = "activations not smoothed"


class SmoothActivations(ir.passes.InPlacePass):
    """Divide the outlying channels of activations, and multiply the weights that read them.

    Attributes:
        sample: Where tokens come from.
        options: How much to smooth.
        made_up: Whether nobody gave them.  If the model reads floats, only norms are smoothed then:
            their outliers come from their parameters, those of a GELU from what it is fed.
            (Whisper's encoder, smoothed by noise, lost 3 dB on other spectrograms.)  Nor is a Mul
            inserted: by random token ids those behind MiniLM's GELUs cost 1.1 dB on real text.
        ranges: What is known of ranges, most of which hold after the change, too.
    """

    @dataclasses.dataclass(frozen=True)
    class Options:
        """How much to smooth.

        Attributes:
            alpha: Exponents to try for each value: 0 leaves all in the activations, 1 moves it all.
            worth: The error must fall below this part of what it was. The tokens may be made up,
                and real ones have other outliers; where these matter (MiniLM) it falls to a half,
                where not (Whisper) to 0.8.
            worth_mul: The same where a Mul must be inserted, after anything but a norm. What is
                large there is large in few tokens, whose error outweighs what others lose.
        """

        alpha: tuple[float, ...] = (0.25, 0.375, 0.5, 0.625, 0.75, 1.0)
        worth: float = 0.75
        worth_mul: float = 0.05

        def __post_init__(self) -> None:
            """Check the values.

            Raises:
                OptionError: No exponent or one outside 0 to 1, or a part that is not above 0.
            """
            if not self.alpha or not all(0 <= alpha <= 1 for alpha in self.alpha):
                raise OptionError(f"alpha must be numbers from 0 to 1, not {self.alpha}")
            for name, part in (("worth", self.worth), ("worth_mul", self.worth_mul)):
                if not part > 0:
                    raise OptionError(f"{name} must be above 0, not {part:g}")

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
        """Smooth every value of the main graph where that pays."""
        smoothed, rows = 0, dict[ir.Value, Rows]()
        with sampled_products(
            model, self.sample, _NOT, made_up=self.made_up, ranges=self.ranges
        ) as sites:
            for some in _in_batches(map(self._plan, by_weights(sites))):
                trials = [plan.trial for plan in some]
                for plan, errors in zip(some, rounding_errors(trials), strict=True):
                    factors = self._try_smooth(model.graph, plan, errors)
                    smoothed += factors is not None
                    for site, tokens in plan.uses:
                        read = site.nodes[0].inputs[0]
                        assert read is not None
                        rows[read] = tokens if factors is None else tokens / factors
        if smoothed:
            FixNames()(model)
        if isinstance(self.sample, KnownRows):
            self.sample.keep(model, {value.name or "": tokens for value, tokens in rows.items()})
        return ir.passes.PassResult(model, smoothed > 0)

    def _plan(self, uses: Sequence[tuple[Products, Rows]]) -> _Plan:
        """What could be done to some values; nothing where no channel is outlying."""
        tokens = uses[0][1] if len(uses) == 1 else np.concatenate([rows for _, rows in uses])
        spread, alphas = _spread(tokens), self.options.alpha
        if not _factors(spread, max(alphas)).max(initial=1) > 1:
            return _Plan(uses, [], {}, Trial(tokens, {}, []))
        absorbers = [_absorber(site) for site, _ in uses]
        tried = _factors(spread, np.array(alphas, np.float32)[:, None])
        tied = {a: _tied(each, absorbers) for a, each in zip(alphas, tried, strict=True)}
        # Of a short range of powers of two several are often the same.
        distinct = {each.tobytes(): each for each in [np.ones_like(spread), *tied.values()]}
        first, nodes = uses[0][0], [node for site, _ in uses for node in site.nodes]
        once = {(plan_of(node), node.inputs[1]): node for node in reversed(nodes)}
        weights = Products(first.value, list(once.values())[::-1]).weights()
        return _Plan(uses, absorbers, tied, Trial(tokens, weights, list(distinct.values())))

    def _try_smooth(self, graph: ir.Graph, plan: _Plan, errors: list[float]) -> Rows | None:
        """Smooth one value if that is worth it; notes what was done, or why not where it could.

        Returns:
            What its channels were divided by, [K].
        """
        alpha, left = plan.best(errors)
        if left >= self.options.worth:
            return None
        rest = f"{left:.2g} of the error"
        if (why := self._reason_not_to(plan, left)) is not None:
            plan.note(f"{_NOT}, which would leave {rest}: {why}")
            return None
        factors = plan.factors[alpha]
        for (site, _), absorber in zip(plan.uses, plan.absorbers, strict=True):
            if isinstance(absorber, str):
                _insert_mul(graph, site, np.reciprocal(factors))
                rest = f"{left:.2g} of the error; by a Mul, because {absorber}"
            else:
                absorber.divide(graph, factors)
        nodes = [node for site, _ in plan.uses for node in site.nodes]
        for weight in dict.fromkeys(node.inputs[1] for node in nodes):
            readers = [node for node in nodes if node.inputs[1] is weight]
            scale_constant(graph, readers, 1, factors[:, None])
        many = f", as those of {len(plan.uses) - 1} more by these weights" * (len(plan.uses) > 1)
        plan.note(f"activations smoothed with alpha={alpha:g}{many}, which leaves {rest}")
        return factors

    def _reason_not_to(self, plan: _Plan, left: float) -> str | None:
        """Why no constant may take the factors, nor a Mul, if so."""
        norms = sum(is_norm(site.value) for site, _ in plan.uses)
        if 2 * norms > len(plan.uses):
            return None  # what makes most of them takes a Mul for nothing
        if len(plan.uses) > 1:
            return f"of {len(plan.uses)} values that they multiply norms make but {norms}"
        (absorber,) = plan.absorbers
        if not isinstance(absorber, str):
            return None
        if self.made_up:
            return f"{absorber}, and a Mul takes given samples"
        if left >= self.options.worth_mul:
            return f"{absorber}, and a Mul is worth it below {self.options.worth_mul:g}"
        return None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What may be done to one value, or to those that are multiplied by the same weights.

    Attributes:
        uses: The products that read each, and its tokens, [tokens, K].
        absorbers: For each what takes the factors, or why nothing can.
        factors: What channels would be divided by, [K], by alpha; none if none is outlying.
        trial: The products with all different factors, those of 1 first.
    """

    uses: Sequence[tuple[Products, Rows]]
    absorbers: Sequence[Absorber | str]
    factors: Mapping[float, Rows]
    trial: Trial

    def note(self, text: str) -> None:
        """Add to the reason of each product."""
        for site, _ in self.uses:
            site.note(text)

    def best(self, errors: list[float]) -> tuple[float, float]:
        """The alpha of the least error of the trial's, and the part of the error that it leaves."""
        if not self.factors:
            return 0.0, 1.0
        keys = (factors.tobytes() for factors in self.trial.factors)
        error_of = dict(zip(keys, errors, strict=True))
        best = min(self.factors, key=lambda alpha: error_of[self.factors[alpha].tobytes()])
        before, after = errors[0], error_of[self.factors[best].tobytes()]
        # Without an error, or one that is not finite, there is nothing to gain.
        return best, after / before if 0 < before < np.inf else 1.0


def _in_batches(plans: Iterable[_Plan]) -> Iterator[list[_Plan]]:
    """Some at a time: large products alone, small ones together.

    What is done to one changes none of those behind it: no weight but its own, and of what makes
    its value.
    """
    batch: list[_Plan] = []
    elements = 0
    for plan in plans:
        batch.append(plan)
        elements += plan.trial.size * len(plan.trial.factors)
        if elements >= AT_ONCE:
            yield batch
            batch, elements = [], 0
    yield batch


def _absorber(site: Products) -> Absorber | str:
    """What takes the factors, or why nothing can."""
    value, nodes = site.value, set(site.nodes)
    if value.is_graph_output():
        return f"{value.name} leaves the graph"
    if any(use.node not in nodes for use in value.uses()):
        return f"{value.name} is read elsewhere too"
    return absorber_of(value)


def _spread(tokens: Rows) -> Rows:
    """How many times as large as that of the median channel each one's maximum is, as log2, [K]."""
    largest = np.abs(tokens).max(axis=0)
    middle = np.sort(largest)[(len(largest) - 1) // 2 : len(largest) // 2 + 1].mean()
    return np.log2(np.maximum(largest / middle, 1.0)) if middle else np.zeros_like(largest)


def _factors(spread: Rows, alpha: float | Rows) -> Rows:
    """T: how much smaller each channel becomes, [K], or for alphas [A, 1] each [A, K]."""
    return np.asarray(np.exp2(np.rint(alpha * spread)), np.float32)


def _tied(factors: Rows, absorbers: Sequence[Absorber | str]) -> Rows:
    for absorber in absorbers:
        factors = absorber.tie(factors) if isinstance(absorber, Absorber) else factors
    return factors


def _insert_mul(graph: ir.Graph, site: Products, inverse: Rows) -> None:
    result = site.value
    operand = new_initializer(graph, f"{result.name}_smoothing", inverse)
    product = ir.node("Mul", [result, operand], name=f"{result.name}_smooth")
    smoothed = product.outputs[0]
    smoothed.name = f"{result.name}_smoothed"
    smoothed.type, smoothed.shape = result.type, result.shape
    place_after(result, [product])
    for node in site.nodes:
        node.replace_input_with(0, smoothed)
