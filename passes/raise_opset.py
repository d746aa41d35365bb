"""Raise the opset of a model, and finish what the converters of onnx and onnxscript leave undone.

1. Resize(x, s), Upsample(x, s) before opset 11   =>   Resize(x, s) on an asymmetric grid
2. Resize(x, roi, [], sizes) before opset 13      =>   Resize(x, roi, "", sizes)
3. Hardmax(x) before opset 13                     =>   Reshape(Hardmax(Flatten(x)), Shape(x))
4. Scan(x) over a batch, opset 8                  =>   Scan of a Scan
5. GroupNormalization(x, s, b) before opset 21    =>   the same with s and b per channel
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnxscript import version_converter

from qcompiler.ir.errors import ModelError
from qcompiler.ir.graph import constant, every_node, new_initializer, replace_nodes
from qcompiler.passes.weightless import weightless_proto

__all__ = ["RaiseOpset"]

_OLDEST_OF_ONNXSCRIPT = 18
_EXPERIMENTS = {"ThresholdedRelu": 10, "LayerNormalization": 17, "SimplifiedLayerNormalization": 99}
"""Ops that ORT runs in opsets that do not have them yet, and which is the first to have them."""
_ASIDE = "qcompiler.aside"


class RaiseOpset(ir.passes.InPlacePass):
    """Bring an inlined model to an opset, unless it has that one or a newer.

    Attributes:
        opset: The opset.
    """

    def __init__(self, opset: int) -> None:
        super().__init__()
        self.opset = opset

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Raise the opset in place.

        Raises:
            ModelError: An op of the model has no converter.
        """
        before = model.graph.opset_imports.setdefault("", self.opset)
        if before >= self.opset:
            return ir.passes.PassResult(model, False)
        if before >= _OLDEST_OF_ONNXSCRIPT:
            _rewrite(model, "GroupNormalization", _spread_groups)
            version_converter.convert_version(model, self.opset)
            return ir.passes.PassResult(model, True)
        if before == 8 and _nodes(model, "Scan"):
            # onnx's converter takes every batch for one of a single example.
            _convert(model, 9, aside=("Scan", "ThresholdedRelu"))
            _rewrite(model, "Scan", _scan_each_example)
        # They came into ONNX as they were, and ORT's optimizers write them into older models.
        aside = [op for op, since in _EXPERIMENTS.items() if before < since]
        _convert(model, self.opset, [op for op in aside if _nodes(model, op)])
        for fixed, op, rewrite in _REPAIRS:
            if before < fixed:
                _rewrite(model, op, rewrite)
        return ir.passes.PassResult(model, True)


def _nodes(model: ir.Model, op: str, domain: str = "") -> list[ir.Node]:
    nodes = every_node(model.graph)
    return [node for node in nodes if node.op_type == op and node.domain == domain]


def _convert(model: ir.Model, opset: int, aside: Sequence[str]) -> None:
    """Let onnx's converter raise the opset of all nodes but those that are set `aside`."""
    for op in aside:
        for node in _nodes(model, op):
            node.domain = _ASIDE
            model.graph.opset_imports[_ASIDE] = 1
    inputs = len(model.graph.inputs)
    proto = weightless_proto(model)
    try:
        converted = onnx.version_converter.convert_version(proto, opset)
    except Exception as error:
        # RuntimeError, or what the C++ library makes of a malformed node.
        before, reason = model.graph.opset_imports[""], str(error).strip().splitlines()[-1]
        raise ModelError(
            f"cannot raise the model from opset {before} to {opset} ({reason}); export it again "
            "with a newer opset"
        ) from error
    graph = ir.from_proto(converted).graph
    for value in graph.inputs:
        original = model.graph.initializers.get(value.name or "")
        if original is not None and value.const_value is None:
            value.const_value = original.const_value
            graph.register_initializer(value)
    declared = list(graph.inputs[:inputs])
    graph.inputs.clear()
    graph.inputs.extend(declared)
    model.graph = graph
    for op in aside:
        for node in _nodes(model, op, _ASIDE):
            node.domain = ""
    graph.opset_imports.pop(_ASIDE, None)


def _rewrite(model: ir.Model, op: str, rewrite: Callable[[ir.Graph, ir.Node], None]) -> None:
    for node in _nodes(model, op):
        rewrite(model.graph, node)


def _place_on_asymmetric_grid(graph: ir.Graph, node: ir.Node) -> None:
    """ORT's nearest neighbour lay below a point for scales of 1 and more, above it for smaller."""
    attributes, scales = node.attributes, node.inputs[-1]
    attributes.add(ir.AttrString("coordinate_transformation_mode", "asymmetric"))
    if attributes.get_string("mode", "nearest") != "nearest":
        return
    attributes.add(ir.AttrString("nearest_mode", "floor"))
    factors = constant(scales)
    if factors is not None and (factors >= 1).all():
        return
    # One axis may grow while another shrinks: first those that grow, then those that shrink.
    one = new_initializer(graph, "unchanged_size", np.ones((), np.float32))
    grow, shrink = ir.node("Max", [scales, one]), ir.node("Min", [scales, one])
    first = ir.node("Resize", [node.inputs[0], None, grow.outputs[0]], dict(attributes))
    second = ir.node(
        "Resize",
        [first.outputs[0], None, shrink.outputs[0]],
        dict(attributes) | {"nearest_mode": ir.AttrString("nearest_mode", "ceil")},
        name=node.name,
    )
    replace_nodes([node], [grow, shrink, first, second])


def _drop_empty_scales(graph: ir.Graph, node: ir.Node) -> None:
    if len(node.inputs) == 4 and node.inputs[3] is not None:
        node.replace_input_with(2, None)


def _flatten_hardmax(graph: ir.Graph, node: ir.Node) -> None:
    data, axis = node.inputs[0], node.attributes.get_int("axis", 1)
    shape = ir.node("Shape", [data])
    matrix = ir.node("Flatten", [data], {"axis": axis})
    largest = ir.node("Hardmax", matrix.outputs, {"axis": -1}, name=node.name)
    result = ir.node("Reshape", [largest.outputs[0], shape.outputs[0]])
    replace_nodes([node], [shape, matrix, largest, result])


def _scan_each_example(graph: ir.Graph, node: ir.Node) -> None:
    """The outer Scan takes the examples of a batch, the inner one the steps of an example."""
    if node.inputs[0] is not None:
        raise ModelError(
            f"{node.name} is a Scan of opset 8 with sequence_lens, which later opsets lack; export "
            "the model again with a newer opset"
        )
    operands = [value for value in node.inputs if value is not None]
    examples = [ir.Value(name=f"{node.name}_example_{i}") for i in range(len(operands))]
    for value, example in zip(operands, examples, strict=True):
        example.type = value.type
        example.shape = None if value.shape is None else ir.Shape(value.shape[1:])
    attributes = dict(node.attributes)
    if directions := attributes.pop("directions", None):
        attributes["scan_input_directions"] = ir.AttrInt64s(
            "scan_input_directions", directions.as_ints()
        )
    node.attributes.clear()
    inner = ir.node("Scan", examples, attributes, num_outputs=len(node.outputs))
    for i, (result, whole) in enumerate(zip(inner.outputs, node.outputs, strict=True)):
        result.name, result.type = f"{node.name}_result_{i}", whole.type
        result.shape = None if whole.shape is None else ir.Shape(whole.shape[1:])
    body = ir.Graph(examples, inner.outputs, nodes=[inner], name=f"{node.name}_example")
    outer = ir.node(
        "Scan",
        operands,
        {"body": body, "num_scan_inputs": len(operands)},
        num_outputs=len(node.outputs),
        name=node.name,
    )
    assert node.graph is not None
    ir.convenience.replace_nodes_and_values(
        node.graph, node, [node], [outer], node.outputs, outer.outputs
    )


def _spread_groups(graph: ir.Graph, node: ir.Node) -> None:
    """The converter of onnxscript loses epsilon, and needs to know the number of channels."""
    home, data = node.graph, node.inputs[0]
    assert home is not None
    groups = node.attributes.get_int("num_groups")
    one, column, flat = (
        new_initializer(graph, name, np.array(sizes, np.int64))
        for name, sizes in (("one", [1]), ("column", [-1, 1]), ("flat", [-1]))
    )
    count = new_initializer(graph, "groups", np.array([groups], np.int64))
    channels = ir.node("Shape", [data], {"start": 1, "end": 2})
    each = ir.node("Div", [channels.outputs[0], count])
    target = ir.node("Concat", [one, each.outputs[0]], {"axis": 0})
    home.insert_before(node, [channels, each, target])
    for index in (1, 2):
        turned = ir.node("Reshape", [node.inputs[index], column])
        spread = ir.node("Expand", [turned.outputs[0], target.outputs[0]])
        result = ir.node("Reshape", [spread.outputs[0], flat])
        home.insert_before(node, [turned, spread, result])
        node.replace_input_with(index, result.outputs[0])


_REPAIRS = (
    (11, "Resize", _place_on_asymmetric_grid),
    (13, "Resize", _drop_empty_scales),
    (13, "Hardmax", _flatten_hardmax),
)
"""What onnx's converter leaves wrong: before which opset, which op, and how it is put right."""
