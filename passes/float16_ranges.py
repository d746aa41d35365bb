"""The largest finite magnitude that tensors of a model reach when it is run.

    x   =>   ReduceMax(Concat(0, Where(Abs(x) <= largest, Abs(x), 0)))

It is computed inside the graph, so that one number per tensor leaves it.  Part of
`convert_float16`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import new_initializer
from qcompiler.passes.float16_rules import MOVING
from qcompiler.passes.planned_products import Sampler

__all__ = ["magnitudes"]

_NAME = "float16_magnitudes"

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
    names = ("zero", "largest", "flat", "first")
    arrays = ([0.0], float(np.finfo(np.float32).max), [-1], [0])
    types = (np.float32, np.float32, np.int64, np.int64)
    constants = [
        new_initializer(copy.graph, f"{_NAME}_{name}", np.asarray(array, dtype))
        for name, array, dtype in zip(names, arrays, types, strict=True)
    ]
    maxima = [_maximum(copy.graph, known[value.name], constants) for value in wanted]
    joined = ir.node("Concat", maxima, {"axis": 1})
    joined.outputs[0].name = _NAME
    joined.outputs[0].dtype = ir.DataType.FLOAT
    joined.outputs[0].shape = ir.Shape([1, len(maxima)])
    copy.graph.append(joined)
    rows = sample(copy, [_NAME]).get(_NAME)
    if rows is None:
        return {}
    reached = dict(zip(wanted, map(float, rows.max(axis=0)), strict=True))
    return {
        value: max((reached[source] for source in _sources(value)), default=1.0) for value in values
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


def _maximum(graph: ir.Graph, value: ir.Value, constants: Sequence[ir.Value]) -> ir.Value:
    """[1, 1]: the largest finite magnitude, 0 of an empty tensor."""
    zero, largest, flat, first = constants
    magnitude = ir.node("Abs", [value])
    finite = ir.node("LessOrEqual", [magnitude.outputs[0], largest])
    kept = ir.node("Where", [finite.outputs[0], magnitude.outputs[0], zero])
    row = ir.node("Reshape", [kept.outputs[0], flat])
    padded = ir.node("Concat", [zero, row.outputs[0]], {"axis": 0})
    maximum = ir.node("ReduceMax", [padded.outputs[0], first], {"keepdims": 1})
    matrix = ir.node("Unsqueeze", [maximum.outputs[0], first])
    nodes = [magnitude, finite, kept, row, padded, maximum, matrix]
    for i, node in enumerate(nodes):
        node.outputs[0].name = f"{value.name}_{_NAME}_{i}"
    graph.extend(nodes)
    return matrix.outputs[0]
