"""The largest finite magnitude that tensors of a model reach when it is run.

    x   =>   ReduceMax(Concat(0, Where(Abs(x) <= largest, Abs(x), 0)))

It is computed inside the graph, so that one number per tensor leaves it, those of each part of a
large model together.  Part of `convert_float16`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import new_initializer, place_after
from qcompiler.passes.float16_rules import MOVING
from qcompiler.passes.planned_products import Sampler

__all__ = ["magnitudes"]

_NAME = "float16_magnitudes"

_PART = 1 << 26
"""Weights between two of the tensors that are asked for: what runs a large model part by part holds
so many at a time, as floats."""

_UP_TO_1 = frozenset({"Cos", "HardSigmoid", "Sigmoid", "Sin", "Softmax", "Softsign", "Tanh"})


def magnitudes(
    model: ir.Model, values: Sequence[ir.Value], sample: Sampler
) -> dict[ir.Value, float]:
    """What some values of the main graph reach; empty if the model could not be run.

    Args:
        model: It is not changed.
        values: FLOAT tensors of any shape, empty ones too.
        sample: Runs the model.

    Raises:
        CalibrationError: A bad sample; names it.
    """
    wanted = dict.fromkeys(source for value in values for source in _sources(value))
    if not wanted:
        return dict.fromkeys(values, 1.0)
    copy = model.clone()
    known = {value.name: value for value in _defined(copy.graph)}
    labels = ("zero", "largest", "flat", "first")
    arrays = ([0.0], float(np.finfo(np.float32).max), [-1], [0])
    types = (np.float32, np.float32, np.int64, np.int64)
    constants = [
        new_initializer(copy.graph, f"{_NAME}_{label}", np.asarray(array, dtype))
        for label, array, dtype in zip(labels, arrays, types, strict=True)
    ]
    parts = _parts(copy.graph, [known[value.name] for value in wanted])
    names = [_join(copy.graph, part, constants, i) for i, part in enumerate(parts)]
    rows = sample(copy, names)
    if not all(name in rows for name in names):
        return {}
    reached = dict[str | None, float]()
    for name, part in zip(names, parts, strict=True):
        maxima = map(float, rows[name].max(axis=0))
        reached |= zip((value.name for value in part), maxima, strict=True)
    return {
        value: max((reached[source.name] for source in _sources(value)), default=1.0)
        for value in values
    }


def _sources(value: ir.Value) -> list[ir.Value]:
    """The values that hold all elements of one, none where they are 1 at most."""
    found, sources = [value], list[ir.Value]()
    for current in found:
        node = current.producer()
        if node is None or node.domain != "" or node.op_type not in MOVING | _UP_TO_1:
            sources += [] if current.dtype is not ir.DataType.FLOAT else [current]
        elif node.op_type in MOVING:
            operands = (v for v in node.inputs if v is not None and v.const_value is None)
            found += [v for v in operands if v.dtype is ir.DataType.FLOAT and v not in found]
    return sources


def _defined(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *(value for node in graph for value in node.outputs)]


def _parts(graph: ir.Graph, values: Sequence[ir.Value]) -> list[list[ir.Value]]:
    """The values in the order in which they are made, those of one part of the weights together."""
    made = set(values)
    parts: list[list[ir.Value]] = [[value for value in graph.inputs if value in made]]
    size, seen = 0, set[ir.Value]()
    for node in graph:
        for value in node.inputs:
            if value is not None and value.const_value is not None and value not in seen:
                seen.add(value)
                size += value.const_value.size
        if (found := [value for value in node.outputs if value in made]) and size > _PART:
            parts.append([])
            size = 0
        parts[-1] += found
    return [part for part in parts if part]


def _join(
    graph: ir.Graph, values: Sequence[ir.Value], constants: Sequence[ir.Value], number: int
) -> str:
    """The name of their magnitudes, [1, values], made and read behind the last of them."""
    nodes = list[ir.Node]()
    maxima = [_maximum(value, constants, nodes) for value in values]
    joined = ir.node("Concat", maxima, {"axis": 1})
    (result,) = joined.outputs
    result.name, result.dtype = f"{_NAME}_{number}", ir.DataType.FLOAT
    result.shape = ir.Shape([1, len(maxima)])
    read = ir.node("Identity", [result])
    read.outputs[0].name = f"{result.name}_read"
    place_after(values[-1], [*nodes, joined, read])
    return str(result.name)


def _maximum(value: ir.Value, constants: Sequence[ir.Value], nodes: list[ir.Node]) -> ir.Value:
    """[1, 1], made by more nodes: the largest finite magnitude, 0 of an empty tensor."""
    zero, largest, flat, first = constants
    magnitude = ir.node("Abs", [value])
    finite = ir.node("LessOrEqual", [magnitude.outputs[0], largest])
    kept = ir.node("Where", [finite.outputs[0], magnitude.outputs[0], zero])
    row = ir.node("Reshape", [kept.outputs[0], flat])
    padded = ir.node("Concat", [zero, row.outputs[0]], {"axis": 0})
    maximum = ir.node("ReduceMax", [padded.outputs[0], first], {"keepdims": 1})
    matrix = ir.node("Unsqueeze", [maximum.outputs[0], first])
    chain = [magnitude, finite, kept, row, padded, maximum, matrix]
    for i, node in enumerate(chain):
        node.outputs[0].name = f"{value.name}_{_NAME}_{i}"
    nodes += chain
    return matrix.outputs[0]
