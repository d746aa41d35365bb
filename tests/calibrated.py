"""Planned models, and what passes that measure are given, on samples held in memory."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
from golden import Feeds, model_of, run, sqnr

from qcompiler.calibrate import observe, run_exactly
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.insert_qdq import Observer
from qcompiler.passes.node_rules import NodeRule
from qcompiler.passes.side_by_side import Runner, quantized_copy
from qcompiler.samples import Samples
from qcompiler.targets.catalog import TARGETS

__all__ = ["facts", "output_sqnr", "planned"]


def planned(
    text: str,
    weights: Mapping[str, Any],
    target: str = "x86-int8",
    rules: Sequence[NodeRule] = (),
) -> ir.Model:
    """A model with the plans of a target; its nodes are node_0, node_1, ..."""
    model = model_of(text, weights)
    for index, node in enumerate(model.graph):
        node.name = f"node_{index}"
    AssignPrecision(TARGETS[target].scheme, rules=tuple(rules))(model)
    return model


def facts(feeds: Sequence[Feeds]) -> tuple[Runner, Observer]:
    """`run` and `observe`, as the driver makes them of calibration samples."""
    samples = Samples(lambda: [dict(feed) for feed in feeds])
    runner = functools.partial(run_exactly, samples=samples)
    return runner, lambda model, names: observe(model, names, samples)


def output_sqnr(model: ir.Model, feeds: Feeds, observer: Observer | None) -> float:
    """Of the first output, with the model quantized as planned, exactly; the model stays float."""
    quantized = quantized_copy(model, observer)
    return sqnr(run(model, feeds, plainly=True)[0], run(quantized, feeds, plainly=True)[0])
