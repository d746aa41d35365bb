"""Make every quantized activation an explicit pair of Q and DQ.

1. Dynamic, per token: the scale is computed in the graph, and the pair is exact in stock ORT.

       s = Max(Slice(ReduceMax(Abs(x))), 1e-20) / 127
       y = MatMul(x, W)   =>   y = MatMul(DQ(Q(x, s), s), W)      axis = -1, block_size = K

   The Slice takes column 0 of a column: ORT returns an empty batch unreduced, [0, K] for [0, 1].
   Stored as int8 without a zero point: ORT 1.31 takes a blocked uint8 DQ before MatMul for a
   per-tensor one and fails at run time.

2. Static, per tensor: the scale and zero point come from calibration.

       y = Relu(Conv(x, W, b))   =>   y = DQ(Q(Relu(Conv(DQ(Q(x)), W, b))))

   What moves such a result on in integers gets a pair of the same scale (`integer_movers`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.arithmetic import scale_and_zero_point
from qcompiler.ir.decisions import NodePlan, decide, plan_of
from qcompiler.ir.dialect import SMALLEST_MAGNITUDE
from qcompiler.ir.errors import CalibrationError
from qcompiler.ir.graph import dequantize_of, new_initializer, place_after, rectified
from qcompiler.ir.types import PerGroup, QuantSpec, TensorStats
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.integer_movers import integer_movers

__all__ = ["InsertQDQ", "Observer"]

Observer = Callable[[ir.Model, Mapping[str, str | None]], Mapping[str, TensorStats]]
"""Runs the model on calibration samples and returns what it saw of the named tensors.

It is told where to cut the range of each off, as in a recipe; None where nothing is said of that.
"""


@dataclasses.dataclass(frozen=True)
class _Site:
    """A tensor that gets a static pair, and who reads the pair; None for all its readers.

    Attributes:
        like: The tensor whose scale it takes; None: one of its own, from calibration.
        calibration: Where its range is cut off; None as for all others.
    """

    value: ir.Value
    spec: QuantSpec
    readers: frozenset[ir.Node] | None
    like: ir.Value | None = None
    calibration: str | None = None


class InsertQDQ(ir.passes.InPlacePass):
    """Insert the activation pairs that the plans ask for; weights are left to the rounding passes.

    Attributes:
        observe: Where static ranges come from; only needed when a plan is static.
    """

    rounds = True

    def __init__(self, observe: Observer | None = None) -> None:
        super().__init__()
        self.observe = observe

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert pairs.

        Raises:
            CalibrationError: A static plan, and nothing to calibrate it with.
        """
        planned = [
            (node, plan)
            for node in model.graph.all_nodes()
            if (plan := plan_of(node)) and dequantize_of(node.inputs[0]) is None
        ]
        static = _static_sites(planned)
        pairs: dict[tuple[ir.Value, QuantSpec], ir.Value] = {}
        constants: dict[str, ir.Value] = {}
        stats = self._observe(model, [node for node, plan in planned if plan.output], static)
        steps: dict[ir.Value, list[ir.Value]] = {}
        for site in static:
            if site.like is None:
                steps[site.value] = _steps(model.graph, site, stats[site.value.name or ""])
            else:
                steps[site.value] = steps[site.like]
            _insert_static(site, steps[site.value])
        for node, plan in planned:
            if plan.activation is not None and plan.activation.scale == "dynamic":
                data = node.inputs[0]
                assert data is not None
                key = (data, plan.activation)
                if key not in pairs:
                    pairs[key] = _insert_dynamic(model.graph, *key, constants)
                node.replace_input_with(0, pairs[key])
        FixNames()(model)
        return ir.passes.PassResult(model, bool(static or pairs))

    def _observe(
        self,
        model: ir.Model,
        nodes: list[ir.Node],
        sites: list[_Site],
    ) -> Mapping[str, TensorStats]:
        if not sites:
            return {}
        if self.observe is None:
            names = ", ".join(node.name or node.op_type for node in nodes[:3])
            more = f" and {len(nodes) - 3} more" if len(nodes) > 3 else ""
            raise CalibrationError(
                f"static activation ranges are needed by {names}{more}: give samples with "
                "--calib DIR (calibration=...), or keep them float with --keep-float Conv"
            )
        own = [site for site in sites if site.like is None]
        return self.observe(model, {site.value.name or "": site.calibration for site in own})


def _static_sites(planned: Sequence[tuple[ir.Node, NodePlan]]) -> list[_Site]:
    """One site per tensor: inputs for their planned readers only, results for every reader."""
    inputs: dict[ir.Value, set[ir.Node]] = {}
    specs: dict[ir.Value, QuantSpec] = {}
    results: dict[ir.Value, ir.Node] = {}
    stored: dict[ir.Value, str | None] = {}
    read: dict[ir.Value, str | None] = {}
    for node, plan in planned:
        data = node.inputs[0]
        assert data is not None
        if plan.activation is not None and plan.activation.scale == "static":
            inputs.setdefault(data, set()).add(node)
            specs[data] = plan.activation
            read[data] = read.get(data) or plan.calibration
        if plan.output is not None:
            result = rectified(node.outputs[0])
            results[result] = node
            specs[result] = plan.output
            stored[result] = plan.calibration
    moved = integer_movers(results, set().union(*inputs.values()))
    sites = [
        _Site(
            value,
            spec,
            None if value in results else frozenset(inputs[value]),
            calibration=stored.get(value) or read.get(value),
        )
        for value, spec in specs.items()
        if value not in moved
    ]
    for value, source in moved.items():
        specs[value] = specs[source]
        sites.append(_Site(value, specs[value], None, source))
    return sites


def _steps(graph: ir.Graph, site: _Site, stats: TensorStats) -> list[ir.Value]:
    """Scale and zero point for what calibration saw."""
    ends = np.asarray([stats.minimum, stats.maximum])
    scale, zero = scale_and_zero_point(ends, site.spec.type)
    name = site.value.name or "value"
    return [
        new_initializer(graph, f"{name}_scale", scale),
        new_initializer(graph, f"{name}_zero_point", zero),
    ]


def _insert_static(site: _Site, steps: Sequence[ir.Value]) -> None:
    value, spec = site.value, site.spec
    name = value.name or "value"
    quantized = ir.node("QuantizeLinear", [value, *steps], name=f"{name}_quantize")
    widened = ir.node("DequantizeLinear", [quantized.outputs[0], *steps], name=f"{name}_dequantize")
    _type(quantized.outputs[0], f"{name}_quantized", spec.type.storage, value.shape)
    _type(widened.outputs[0], f"{name}_dequantized", ir.DataType.FLOAT, value.shape)
    for node in (quantized, widened):
        decide(node, "qdq", "static pair at the border of integer ops")
    uses = [
        use
        for use in value.uses()
        if use.node is not quantized and (site.readers is None or use.node in site.readers)
    ]
    place_after(value, [quantized, widened])
    for use in uses:
        use.node.replace_input_with(use.idx, widened.outputs[0])


def _insert_dynamic(
    graph: ir.Graph, value: ir.Value, spec: QuantSpec, constants: dict[str, ir.Value]
) -> ir.Value:
    """The dequantized value of a new per-token pair on `value`; pairs share their `constants`."""

    def constant(name: str, array: NDArray[Any]) -> ir.Value:
        if name not in constants:
            constants[name] = new_initializer(graph, name, array)
        return constants[name]

    granularity = spec.type.granularity
    assert isinstance(granularity, PerGroup)
    name, attributes = value.name or "value", {"axis": -1, "block_size": granularity.group_size}
    token_shape = None if value.shape is None else ir.Shape([*value.shape.dims[:-1], 1])
    magnitude = ir.node("Abs", [value], name=f"{name}_abs")
    last = constant("last_axis", np.asarray([-1], np.int64))
    reduced = ir.node(
        "ReduceMax", [magnitude.outputs[0], last], {"keepdims": 1}, name=f"{name}_reduced"
    )
    ends = [constant(name, np.asarray([i], np.int64)) for i, name in enumerate(("first", "second"))]
    largest = ir.node("Slice", [reduced.outputs[0], *ends, last], name=f"{name}_absmax")
    floor = constant("smallest_magnitude", np.asarray(SMALLEST_MAGNITUDE, np.float32))
    bounded = ir.node("Max", [largest.outputs[0], floor], name=f"{name}_bounded")
    largest_step = spec.type.range[1]
    top = constant(f"largest_step_{largest_step}", np.asarray(largest_step, np.float32))
    scale = ir.node("Div", [bounded.outputs[0], top], name=f"{name}_scale")
    quantized = ir.node(
        "QuantizeLinear",
        [value, scale.outputs[0]],
        attributes | {"output_dtype": int(spec.type.storage)},
        name=f"{name}_quantize",
    )
    widened = ir.node(
        "DequantizeLinear",
        [quantized.outputs[0], scale.outputs[0]],
        attributes,
        name=f"{name}_dequantize",
    )
    _type(magnitude.outputs[0], f"{name}_abs", ir.DataType.FLOAT, value.shape)
    for node in (reduced, largest, bounded, scale):
        _type(node.outputs[0], f"{node.name}_value", ir.DataType.FLOAT, token_shape)
    _type(quantized.outputs[0], f"{name}_quantized", spec.type.storage, value.shape)
    _type(widened.outputs[0], f"{name}_dequantized", ir.DataType.FLOAT, value.shape)
    place_after(value, [magnitude, reduced, largest, bounded, scale, quantized, widened])
    return widened.outputs[0]


def _type(value: ir.Value, name: str, dtype: ir.DataType, shape: ir.Shape | None) -> None:
    value.name, value.dtype, value.shape = name, dtype, shape
