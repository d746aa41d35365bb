"""Models with outliers planted in them, and tokens to find them by."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from golden import Feeds, run
from numpy.typing import NDArray

from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.planned_products import Sampler
from qcompiler.targets.catalog import TARGETS


def sampler(feeds: Feeds) -> Sampler:
    """Rows that the named values have on `feeds`."""

    def sample(model: ir.Model, names: list[str]) -> dict[str, NDArray[np.float32]]:
        copy = model.clone()
        values = {value.name: value for node in copy.graph for value in node.outputs}
        copy.graph.outputs[:] = [values[name] for name in names if name in values]
        computed = [value.name for value in copy.graph.outputs]
        results = run(copy, feeds) if computed else []
        tensors = {**feeds, **dict(zip(computed, results, strict=True))}
        return {name: tensors[name].reshape(-1, tensors[name].shape[-1]) for name in names}

    return sample  # type: ignore[return-value]


def plan(model: ir.Model, target: str = "x86-int8") -> ir.Model:
    """The model with names for its nodes, and plans for those that a target quantizes."""
    for index, node in enumerate(model.graph):
        node.name = node.name or f"node_{index}"
    AssignPrecision(TARGETS[target].scheme)(model)
    return model
