"""Store planned weights as integers, each rounded to the nearest step.

    y = MatMul(x, W)       =>   y = MatMul(x, DQ(W_q, s))          W_q = round(W / s)
    y = Conv(DQ(x), W, b)  =>   y = Conv(DQ(x), DQ(W_q, s), DQ(b_q, s * s_x))
    y = MatMul(x, W)       =>   y = MatMul(x, Cast(W_f8) * s)      for FP8

Scales map the largest magnitude of each channel or group to the end of the range, of few bits to
its longer side, or are those of the least squared error (`ir/clipped_scale.py`).  A weight that
other nodes read too keeps its float form for them.  FP8 weights are widened by Cast and Mul: ORT
1.31 takes two fp8 DQs before a MatMul for a uint8 product and refuses the model.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.arithmetic import quantize, weight_scale
from qcompiler.ir.decisions import NodePlan, bias_shift, plan_of
from qcompiler.ir.errors import OptionError, did_you_mean
from qcompiler.ir.graph import (
    added_bias,
    constant,
    dequantize_of,
    drop_if_unread,
    every_node,
    label,
    new_initializer,
)
from qcompiler.ir.on_disk import let_go
from qcompiler.ir.types import QuantType
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.rounded_weight import finite_weight, note_small_weights, place_dequantize
from qcompiler.passes.weight_grid import RANGES, rounded_on, weight_grid

__all__ = ["RoundToNearest"]


class RoundToNearest(ir.passes.InPlacePass):
    """Replace each planned weight by its rounded form and a DequantizeLinear.

    Attributes:
        options: How scales are chosen.
    """

    @dataclasses.dataclass(frozen=True)
    class Options:
        """How scales are chosen.

        Attributes:
            scale: "max" maps the largest magnitude to the end of the range, "mse" rounds with the
                least squared error. That gains up to 1 dB in the weights, and loses in a model
                whose few large weights count most: SmolLM2 has a perplexity of 23.4 with max and
                23.6 with mse in groups of 32, 25.2 and 28.9 in groups of 64.
        """

        scale: str = "max"

        def __post_init__(self) -> None:
            """Check the values.

            Raises:
                OptionError: A scale that is neither "max" nor "mse".
            """
            if self.scale not in RANGES:
                hint = did_you_mean(str(self.scale), RANGES)
                raise OptionError(f"scale must be max or mse, not {self.scale!r}{hint}")

    rounds = True

    def __init__(self, options: Options | None = None) -> None:
        super().__init__()
        self.options = options or self.Options()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Round every planned weight.

        Raises:
            ModelError: A weight holds NaN or Inf.
            OptionError: A convolution has no pair at its input: insert-qdq did not run.
        """
        rounded: dict[tuple[ir.Value, QuantType, bytes], ir.Node] = {}
        planned = [
            (node, plan)
            for node in every_node(model.graph)
            if (plan := plan_of(node)) and constant(node.inputs[1]) is not None
        ]
        for node, plan in planned:
            _check_pair(node)
            _check_rounding(node, plan)
        for node, plan in planned:
            weight = node.inputs[1]
            assert weight is not None
            floor = _scale_floor(node)
            key = (weight, plan.weight, floor.tobytes())
            if key not in rounded:
                rounded[key] = _round(
                    model.graph, node, weight, plan.weight, floor, self.options.scale
                )
            array, scale = constant(weight), constant(rounded[key].inputs[1])
            if array is not None and scale is not None:  # scales of two levels are products
                note_small_weights([node], array, scale, plan.weight)
            let_go(weight)
            node.replace_input_with(1, rounded[key].outputs[0])
            if node.op_type == "Conv":
                _round_bias(model.graph, node, rounded[key])
            else:
                _shift_bias(model.graph, node)
            drop_if_unread(weight)
        FixNames()(model)
        return ir.passes.PassResult(model, bool(planned))


def _check_rounding(node: ir.Node, plan: NodePlan) -> None:
    if plan.rounding != "nearest":
        missing = plan.rounding.rpartition("_")[2]
        raise OptionError(
            f"{label(node)!r} is to be rounded by {missing}, which the pipeline leaves out: add "
            f'{missing} before insert-qdq, or say rounding = "nearest"'
        )


def _check_pair(node: ir.Node) -> None:
    data = dequantize_of(node.inputs[0])
    if node.op_type == "Conv" and (data is None or constant(data.inputs[1]) is None):
        raise OptionError(
            f"round-to-nearest needs insert-qdq before it: the input of {label(node)!r}, whose "
            "step its bias takes, is not quantized"
        )


def _scale_floor(node: ir.Node) -> NDArray[np.float32]:
    """The least weight scale per channel at which an int32 still holds the bias of a Conv.

    A dead channel (all weights zero, common after a BatchNorm was folded) may have a bias; at the
    tiny scale its weights alone would give, that bias would saturate and be lost.
    """
    data = dequantize_of(node.inputs[0])
    bias = _bias(node)
    if node.op_type != "Conv" or bias is None or data is None:
        return np.zeros((), np.float32)
    steps = np.asarray(constant(data.inputs[1]), np.float64)
    return np.asarray(np.abs(np.asarray(bias, np.float64)) / (steps * 2**30), np.float32)


def _round(
    graph: ir.Graph,
    node: ir.Node,
    weight: ir.Value,
    type: QuantType,
    floor: NDArray[np.float32],
    range: str,
) -> ir.Node:
    """A new DequantizeLinear, at the front of the graph, of the rounded weight."""
    array = finite_weight(node, weight)
    if type.is_float:
        return _widen(graph, weight.name or "weight", array, type)
    grid = weight_grid(array, type, range)
    if floor.any():
        grid = dataclasses.replace(grid, scale=np.maximum(grid.scale, floor))
    rounded = rounded_on(array, type, grid)
    stored = np.ascontiguousarray(rounded.stored)  # it may be a transposed view
    return place_dequantize(graph, weight, type, dataclasses.replace(rounded, stored=stored))


def _widen(graph: ir.Graph, name: str, array: NDArray[np.float32], type: QuantType) -> ir.Node:
    """`Cast(stored) * scale` for one scale per column."""
    scale = weight_scale(array, type)
    stored = np.ascontiguousarray(quantize(array, scale, type))
    inputs = [
        new_initializer(graph, f"{name}_{type.storage.name.lower()}", stored, type.storage),
        new_initializer(graph, f"{name}_scale", scale),
    ]
    product = ir.node("Mul", inputs, name=f"{name}_dequantize")
    _place(graph, product, name, array.shape)
    cast = ir.node("Cast", inputs[:1], {"to": int(ir.DataType.FLOAT)}, name=f"{name}_widen")
    product.replace_input_with(0, _place(graph, cast, f"{name}_wide", array.shape).outputs[0])
    return product


def _round_bias(graph: ir.Graph, conv: ir.Node, weight: ir.Node) -> None:
    """The bias of an integer convolution is an int32 at the scale of its accumulators."""
    dequantize = dequantize_of(conv.inputs[0])
    assert dequantize is not None  # see _check_pair
    weight_steps = np.asarray(constant(weight.inputs[1]), np.float32)
    steps = weight_steps * np.asarray(constant(dequantize.inputs[1]), np.float32)
    bias = _bias(conv)
    array: NDArray[Any] = np.zeros_like(steps) if bias is None else bias
    # Within int32: see _scale_floor.
    stored = np.rint(np.asarray(array, np.float64) / steps)
    name = f"{conv.name}_bias"
    inputs = [
        new_initializer(graph, f"{name}_int32", stored.astype(np.int32)),
        new_initializer(graph, f"{name}_scale", steps),
    ]
    widened = ir.node("DequantizeLinear", inputs, {"axis": 0}, name=f"{name}_dequantize")
    conv.resize_inputs(3)
    conv.replace_input_with(2, _place(graph, widened, name, stored.shape).outputs[0])


def _shift_bias(graph: ir.Graph, product: ir.Node) -> None:
    """Take the shift that a product's plan says from what is added to it."""
    shift, added = bias_shift(product), added_bias(product)
    if shift is None or added is None:
        return
    add, index = added
    old = add.inputs[index]
    assert old is not None
    shifted = np.asarray(constant(old), np.float32) - shift
    add.replace_input_with(index, new_initializer(graph, f"{product.name}_bias", shifted))
    drop_if_unread(old)


def _bias(conv: ir.Node) -> NDArray[Any] | None:
    """The float bias of a Conv less the shift that its plan says, None without either."""
    bias, shift = constant(conv.inputs[2]) if len(conv.inputs) > 2 else None, bias_shift(conv)
    if bias is None or shift is None:
        return bias if shift is None else -shift
    return np.asarray(bias - shift)


def _place(graph: ir.Graph, node: ir.Node, name: str, shape: tuple[int, ...]) -> ir.Node:
    """Put a node that reads only constants at the front of the graph and type its output."""
    output = node.outputs[0]
    output.name, output.dtype = f"{name}_dequantized", ir.DataType.FLOAT
    output.shape = ir.Shape(shape)
    graph.insert_before(graph[0], node)
    return node
