"""A pass with options, a rule, and what tests of pipelines feed."""

import dataclasses

import numpy as np
import onnx_ir as ir
from onnxscript import rewriter

from qcompiler.pipeline import Pipeline

KNOWN = ("alpha", "beta", "gamma")
FEEDS = {"x": np.random.default_rng(1).standard_normal((5, 64), dtype=np.float32)}


class Halve(ir.passes.InPlacePass):
    """Multiplies every bias: a pass in ten lines, with an option."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        """By how much.

        Attributes:
            factor: What biases are multiplied
                by.
            names: Of the biases; by default all.
            really: Whether at all.
        """

        factor: float = 0.5
        names: tuple[str, ...] | None = None
        really: bool | None = None
        times: int = 1
        note: str = "none"

    def __init__(self, options=None):
        super().__init__()
        self.options = options or self.Options()

    def call(self, model):
        for value in model.graph.initializers.values():
            if len(value.shape) == 1 and value.dtype is ir.DataType.FLOAT:
                array = value.const_value.numpy() * np.float32(self.options.factor)
                value.const_value = ir.tensor(array, name=value.name)
        return ir.passes.PassResult(model, True)


class Break(ir.passes.InPlacePass):
    """Does to the graph what its first argument says."""

    changes_interface = True

    def __init__(self, change):
        super().__init__()
        self.change = change

    def call(self, model):
        self.change(model.graph)
        return ir.passes.PassResult(model, True)


def halving(target="arm-int8"):
    pipeline = Pipeline.default(target)
    pipeline.insert_after("fuse-gelu", "halve", Halve())
    return pipeline


def negated_twice(op, x):
    return op.Neg(op.Neg(x))


def identity(op, x):
    return op.Identity(x)


def sum_with_itself(op, x):
    return op.Mul(x, op.Constant(value_float=2.0))


RULE = rewriter.RewriteRule(negated_twice, identity)
