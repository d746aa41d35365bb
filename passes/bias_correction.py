"""Take from a bias what rounding adds to its channel on average.

    y' = Conv(DQ(Q(x)), W_q, b)   =>   Conv(DQ(Q(x)), W_q, b - E[y' - y])        y = Conv(x, W, b)
    y' = MatMul(DQ(Q(x)), W_q) + b   =>   MatMul(DQ(Q(x)), W_q) + (b - E[y' - y])

Rounded weights of inputs that are not centred around 0 add (W_q - W) E[x] to every result: a shift,
not noise, which the layers below carry on (Nagel et al., Data-free quantization through weight
equalization and bias correction, 2019).  Inputs are the float model's own, so that each site is
corrected for itself, and the mean is over what the convolution reads, padding included.

No shift is judged by the samples that it was found on: with d_i the mean error of sample i and m_i
the mean of the others', the shift is k mean(d), with k from 0 to 1 such that the correction k m_i
leaves sample i the least error on average.  It is made where that takes a part of the node's error
off (`least`).  One sample alone corrects nothing; each picture of a batch is one.

The pass only plans: it finds the shift of each planned node on some samples, on the model as
smoothing and equalization left it, and the pass that rounds the weight takes it off the bias.  Of
MatMuls those are looked at that have static scales, weights rounded to nearest and an Add of a
constant behind them: others have no bias, or need no samples, for which no model is run.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.decisions import bias_shift, plan_of, set_bias_shift
from qcompiler.ir.errors import OptionError
from qcompiler.ir.graph import added_bias
from qcompiler.passes.insert_qdq import is_static
from qcompiler.passes.measuring_pass import MeasuringPass
from qcompiler.passes.side_by_side import Comparison, Rows, own_errors, quantized_copy

__all__ = ["BiasCorrection"]


class BiasCorrection(MeasuringPass):
    """Find by how much the bias of each planned Conv or MatMul is to change.

    Attributes:
        run: Runs the model on samples; without it nothing is corrected.
        observe: Where static ranges come from.
        options: When to correct.
    """

    @dataclasses.dataclass(frozen=True)
    class Options:
        """When to correct.

        Attributes:
            least: The part of a node's squared error that a correction must take off samples that
                it was not found on.
        """

        least: float = 0.05

        def __post_init__(self) -> None:
            """Check the value.

            Raises:
                OptionError: A part that does not lie between 0 and 1.
            """
            if not 0 <= self.least <= 1:
                raise OptionError(f"least must be a part from 0 to 1, not {self.least:g}")

    options: Options

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Measure the shift of every planned node of the main graph that has a bias.

        Raises:
            CalibrationError: A static plan, and nothing to calibrate it with.
        """
        nodes = {
            node.name or "": node
            for node in model.graph
            if _has_bias(node) and bias_shift(node) is None
        }
        if not nodes or self.run is None:
            return ir.passes.PassResult(model, False)
        copy = quantized_copy(model, self.observe)
        joined, found = own_errors(model, copy, list(nodes), stored=False)
        rows = self.run(joined, [name for sums in found.values() for name in sums.names])
        corrected = sum(self._correct(node, rows, found[name]) for name, node in nodes.items())
        return ir.passes.PassResult(model, corrected > 0)

    def _correct(self, node: ir.Node, rows: Rows, means: Comparison) -> bool:
        drifts = np.asarray(rows[means.drift], np.float64)
        if len(drifts) < 2:
            return False
        trust, gain = _held_out(drifts)
        share = gain.sum() / max(float(rows[means.noise].mean(axis=0).sum()), 1e-30)
        if not share >= self.options.least:  # so that NaN is left alone
            return False
        shift = np.asarray(trust * drifts.mean(axis=0), np.float32)
        set_bias_shift(node, shift, f"bias corrected: {share:.0%} of its squared error")
        return True


def _has_bias(node: ir.Node) -> bool:
    """Whether a node is planned whose bias can change."""
    plan = plan_of(node)
    if plan is None or node.op_type == "Conv":
        return plan is not None
    nearest = plan.rounding == "nearest" and plan.output is None
    return nearest and is_static(node) and added_bias(node) is not None


def _held_out(drifts: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How much of the mean of `drifts`, [samples, C], a sample shares that was not part of it.

    Returns:
        [C], from 0 to 1, and by how much the squared error of such a sample falls for it, [C].
    """
    count = len(drifts)
    others = (drifts.sum(axis=0) - drifts) / (count - 1)
    shared, power = (others * drifts).mean(axis=0), np.square(others).mean(axis=0)
    trust = np.clip(shared / np.maximum(power, 1e-30), 0, 1)
    return trust, 2 * trust * shared - np.square(trust) * power
