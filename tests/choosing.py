"""The pass choose-kernels with costs that a test names."""

from __future__ import annotations

import numpy as np
from golden import model_of

from qcompiler.ir.sites import Costs
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.choose_kernels import ChooseKernels
from qcompiler.targets.catalog import get_target

MATMUL = "g (float[m,64] x) => (float[m,48] y) { y = MatMul (x, w) }"
STATIC = "g (float[2,3,64] x) => (float[2,3,48] y) { y = MatMul (x, w) }"
W = {"w": np.ones((64, 48), np.float32)}
CHAIN = """
g (float[1,8,16,16] x) => (float[1,8,16,16] y)
{ a = Conv <pads = [1,1,1,1]> (x, u) b = Relu (a) c = Conv <pads = [1,1,1,1]> (b, v)
  d = Conv <pads = [1,1,1,1]> (c, w) y = Exp (d) }
"""
KERNELS = {name: np.full((8, 8, 3, 3), 0.1, np.float32) for name in "uvw"}
BORDER = 10.0


def planned(text, weights, target="x86-int8"):
    model = model_of(text, weights)
    options = AssignPrecision.Options(group_size=16 if target.endswith("int4") else None)
    AssignPrecision(get_target(target).scheme, options)(model)
    return model


def choosing(times, *, kernels=True, shapes=None, **options):
    """The pass, with these microseconds: one for all points, or a list for one and two threads."""

    def costs(sites):
        return [None if times is None else costs_of(site, times) for site in sites]

    return ChooseKernels(
        costs, lambda elements: BORDER, lambda region: None if kernels else "none",
        lambda model, names: {n: (shapes or {})[n] for n in names if n in (shapes or {})},
        **options,
    )  # fmt: skip


def choosing_convs(times):
    """The pass, with the microseconds that each convolution of `CHAIN` takes."""

    def costs(sites):
        return [costs_of(site, times(name)) for site, name in zip(sites, "uvw", strict=True)]

    return ChooseKernels(
        costs, lambda elements: BORDER, lambda region: None, lambda model, names: {}
    )


def costs_of(site, times):
    """Where `times` is a function, it is asked for the site's."""
    times = times(site) if callable(times) else times
    points = [(threads, shape) for threads in (1, 2) for shape in site.inputs]
    listed = {
        name: [value] * len(points) if isinstance(value, float | int)
        else [value[threads - 1] for threads, _ in points]
        for name, value in times.items()
    }  # fmt: skip
    return Costs("timed", tuple(points), {name: tuple(listed[name]) for name in times})


def only(model, op="MatMul"):
    (node,) = (node for node in model.graph if node.op_type == op)
    return node
