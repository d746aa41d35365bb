"""A pass and a rewrite rule of your own in a compilation: python examples/custom_pass.py [TARGET].

Prints what each pass did to the model's results on the samples, and leaves digits.custom/.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import RewriteRule

import qcompiler
from qcompiler.model_runs import ModelRuns
from qcompiler.numerics import CheckNumerics
from qcompiler.samples import Samples

DIGITS = Path(__file__).parent / "digits"


class ClipWeights(ir.passes.InPlacePass):
    """Clip each column of a weight at four deviations: its step is as coarse as its largest."""

    rounds = True

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Clip the weights of products."""
        products = [node for node in model.graph if node.op_type == "MatMul"]
        weights = {node.inputs[1] for node in products if node.inputs[1].is_initializer()}
        for weight in weights:
            array = weight.const_value.numpy()
            limit = 4 * array.std(axis=0)
            weight.const_value = ir.tensor(array.clip(-limit, limit), name=weight.name)
        return ir.passes.PassResult(model, bool(weights))


def exact_gelu(op: Any, x: ir.Value) -> ir.Value:
    """What the rule looks for; a pattern matches any node with these attributes."""
    return op.Gelu(x, approximate="none")


def gelu_by_tanh(op: Any, x: ir.Value) -> ir.Value:
    """What it puts there instead: cheaper, and 60 dB and more below the exact one."""
    return op.Gelu(x, approximate="tanh")


def main(target: str = "x86-int8", output: Path = Path("digits.custom")) -> list[str]:
    """Compile the digits example, and say what the passes were and did."""
    samples = Samples(DIGITS / "calib")
    passes = qcompiler.Pipeline.default(target, runs=ModelRuns.on(samples))
    passes.insert_before("assign-precision", "clip-weights", ClipWeights())
    passes.insert_after("fuse-gelu", "gelu-by-tanh", RewriteRule(exact_gelu, gelu_by_tanh))
    numerics = CheckNumerics(samples)
    qcompiler.compile(DIGITS / "digits.onnx", target, output, pipeline=passes, watchers=[numerics])
    for change in numerics.changes:
        sqnr = "equal" if change.sqnr is None else f"{change.sqnr:.1f} dB"
        print(f"{change.step:20} {sqnr if change.changed else ''}")
    return [change.step for change in numerics.changes if change.changed]


if __name__ == "__main__":
    main(*sys.argv[1:2])
