"""Make every quantized activation an explicit pair of Q and DQ.

1. Dynamic, per token: the scale is computed in the graph, and the pair is exact in stock ORT.

       s = Max(Slice(ReduceMax(Abs(x))), 1e-20) / 127
       y = MatMul(x, W)   =>   y = MatMul(DQ(Q(x, s), s), W)      axis = -1, block_size = K

   The Slice takes column 0 of a column: ORT returns an empty batch unreduced, [0, K] for [0, 1].
   Stored as int8 without a zero point: ORT 1.31 takes a blocked uint8 DQ before MatMul for a
   per-tensor one and fails at run time.

2. Static, per tensor: the scale and zero point come from calibration (`static_sites`).

       y = Relu(Conv(x, W, b))   =>   y = DQ(Q(Relu(Conv(DQ(Q(x)), W, b))))
       y = Add(a, b)             =>   y = DQ(Q(Add(DQ(Q(a)), DQ(Q(b)))))     (`static_pairs`)

   What touches a tensor that was nothing but 0 in all samples, or never there, stays float: no
   scale can be made of that, and where the tensor is something else one day all of it would be
   lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.arithmetic import SMALLEST_SCALE
from qcompiler.ir.decisions import keep_float, operand_plan_of, plan_of
from qcompiler.ir.dialect import SMALLEST_MAGNITUDE
from qcompiler.ir.errors import CalibrationError
from qcompiler.ir.graph import (
    dequantize_of,
    every_node,
    label,
    new_initializer,
    place_after,
    rectified,
)
from qcompiler.ir.types import PerGroup, QuantSpec, TensorStats
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.static_pairs import insert_static
from qcompiler.passes.static_sites import StaticSite, static_sites

__all__ = ["InsertQDQ", "Observer", "is_static", "missing_samples"]

Observer = Callable[[ir.Model, Mapping[str, str | None]], Mapping[str, TensorStats]]
"""Runs the model on calibration samples and returns what it saw of the named tensors.

It is told where to cut the range of each off, as in a recipe; None where nothing is said of that.
"""

Sites = Mapping[ir.Value, StaticSite]


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
        nodes = list(every_node(model.graph))
        sites, stats = self._observed(model, nodes)
        dynamic = [
            (node, plan.activation)
            for node in nodes
            if (plan := plan_of(node)) and plan.activation and plan.activation.scale == "dynamic"
            if dequantize_of(node.inputs[0]) is None
        ]
        insert_static(model.graph, sites, stats)
        pairs: dict[tuple[ir.Value, QuantSpec], ir.Value] = {}
        constants: dict[str, ir.Value] = {}
        for node, spec in dynamic:
            data = node.inputs[0]
            assert data is not None
            key = (data, spec)
            if key not in pairs:
                pairs[key] = _insert_dynamic(model.graph, *key, constants)
            node.replace_input_with(0, pairs[key])
        FixNames()(model)
        return ir.passes.PassResult(model, bool(sites or pairs))

    def _observed(
        self, model: ir.Model, nodes: Sequence[ir.Node]
    ) -> tuple[Sites, Mapping[str, TensorStats]]:
        """The sites of a model, and the ranges of those that have one of their own.

        Nodes whose tensors have no range lose their plans on the way.
        """
        stats: dict[str, TensorStats] = {}
        while sites := static_sites(nodes):
            own = [site for site in sites.values() if site.like is None and site.stats is None]
            new = {
                name: site.calibration
                for site in own
                if (name := site.value.name or "") not in stats
            }
            if new:
                found = self._ask(model, nodes, new)
                stats |= {name: found.get(name, _NOTHING) for name in new}
            empty = [site for site in own if _is_empty(stats[site.value.name or ""])]
            if not empty:
                break
            for site in empty:
                _give_up(site, nodes, stats[site.value.name or ""])
        return sites, stats

    def _ask(
        self, model: ir.Model, nodes: Sequence[ir.Node], names: Mapping[str, str | None]
    ) -> Mapping[str, TensorStats]:
        if self.observe is None:
            raise missing_samples(nodes)
        return self.observe(model, names)


def missing_samples(nodes: Sequence[ir.Node]) -> CalibrationError:
    """What to say where static ranges are needed by some of `nodes`, and there are no samples."""
    static = [node for node in nodes if is_static(node)]
    way_out = f"keep them float with --keep-float {static[0].op_type if static else 'Conv'}"
    if not static and (products := [node for node in nodes if operand_plan_of(node) is not None]):
        static, way_out = products, "leave out products of assign-precision"
    named = ", ".join(label(node) for node in static[:3])
    more = f" and {len(static) - 3} more" if len(static) > 3 else ""
    return CalibrationError(
        f"static activation ranges are needed by {named}{more}: give samples with "
        f"--calib DIR (calibration=...), or {way_out}"
    )


def is_static(node: ir.Node) -> bool:
    """Whether `node` is to read activations whose scales come from calibration."""
    plan = plan_of(node)
    return plan is not None and plan.activation is not None and plan.activation.scale == "static"


_NOTHING = TensorStats(np.inf, -np.inf)


def _is_empty(stats: TensorStats) -> bool:
    """Whether nothing in a tensor was as large as one step of the smallest scale."""
    return stats is _NOTHING or not max(-stats.minimum, stats.maximum) > SMALLEST_SCALE


def _give_up(site: StaticSite, nodes: Sequence[ir.Node], stats: TensorStats) -> None:
    """Keep float what reads or makes a tensor of which nothing is known."""
    why = "was nothing but 0"
    if stats is _NOTHING:
        why = "was never there"
    elif (largest := max(-stats.minimum, stats.maximum)) > 0:
        why = f"was {largest:.3g} at most, below one step of the smallest scale"
    for node in nodes:
        touched = [*node.inputs, *node.outputs, *(rectified(value) for value in node.outputs)]
        planned = plan_of(node) is not None or operand_plan_of(node) is not None
        if planned and site.value in touched and (site.readers is None or node in site.readers):
            keep_float(node, f"in all calibration samples {site.value.name!r} {why}: no scale")


def _insert_dynamic(
    graph: ir.Graph, value: ir.Value, spec: QuantSpec, constants: dict[str, ir.Value]
) -> ir.Value:
    """The dequantized value of a new per-token pair on `value`; pairs share their `constants`."""
    granularity = spec.type.granularity
    assert isinstance(granularity, PerGroup)
    name, attributes = value.name or "value", {"axis": -1, "block_size": granularity.group_size}
    computed = _scale_of_each_token(graph, value, spec.type.range[1], constants)
    scale = computed[-1].outputs[0]
    quantized = ir.node(
        "QuantizeLinear",
        [value, scale],
        attributes | {"output_dtype": int(spec.type.storage)},
        name=f"{name}_quantize",
    )
    widened = ir.node(
        "DequantizeLinear", [quantized.outputs[0], scale], attributes, name=f"{name}_dequantize"
    )
    _type(quantized.outputs[0], f"{name}_quantized", spec.type.storage, value.shape)
    _type(widened.outputs[0], f"{name}_dequantized", ir.DataType.FLOAT, value.shape)
    place_after(value, [*computed, quantized, widened])
    return widened.outputs[0]


def _scale_of_each_token(
    graph: ir.Graph, value: ir.Value, largest_step: float, constants: dict[str, ir.Value]
) -> list[ir.Node]:
    """The nodes that compute it, the last of which results in it."""

    def constant(name: str, array: NDArray[Any]) -> ir.Value:
        if name not in constants:
            constants[name] = new_initializer(graph, name, array)
        return constants[name]

    name = value.name or "value"
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
    top = constant(f"largest_step_{largest_step}", np.asarray(largest_step, np.float32))
    scale = ir.node("Div", [bounded.outputs[0], top], name=f"{name}_scale")
    _type(magnitude.outputs[0], f"{name}_abs", ir.DataType.FLOAT, value.shape)
    for node in (reduced, largest, bounded, scale):
        _type(node.outputs[0], f"{node.name}_value", ir.DataType.FLOAT, token_shape)
    return [magnitude, reduced, largest, bounded, scale]


def _type(value: ir.Value, name: str, dtype: ir.DataType, shape: ir.Shape | None) -> None:
    value.name, value.dtype, value.shape = name, dtype, shape
