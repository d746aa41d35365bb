"""What the liftings of operator-oriented quantized ops share: the pairs around a float op.

Part of `lift_qoperators`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.decisions import decide
from qcompiler.ir.graph import constant, drop_if_unread, new_initializer

__all__ = ["Form", "NotLiftedError", "size_of"]


_PAIRS = ("DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear")
_OTHER_TYPES = ("DynamicQuantizeLinear", "Mul", "QuantizeLinear", "Squeeze")
"""Ops of a form whose result has not the type of the first operand and the shape of the whole."""


class NotLiftedError(Exception):
    """Why an op stays as it is; the pass records it as the node's decision."""


class Form:
    """The float op and its pairs that take the place of a quantized op, made node by node.

    Attributes:
        node: What is lifted.
        covered: It and what else the form replaces, in order; the last one's output is the form's.
        nodes: The form so far, in topological order.
    """

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.node, self.covered = node, [node]
        self.nodes: list[ir.Node] = []
        self._graph, self._stem = graph, node.name or node.op_type
        self._constants: list[ir.Value] = []

    def inputs(self, count: int) -> tuple[ir.Value | None, ...]:
        """The node's inputs, filled up to `count` with None for those that were left out."""
        given = tuple(self.node.inputs)
        return given + (None,) * (count - len(given))

    def attributes(self, *without: str) -> dict[str, ir.Attr]:
        """The node's attributes but those named."""
        return {k: a for k, a in self.node.attributes.items() if k not in without}

    @property
    def in_branch(self) -> bool:
        """Whether the node is part of a subgraph, while its constants lie outside."""
        return self.node.graph is not self._graph

    def needs_opset(self, version: int, what: str) -> None:
        """Check that the model has an opset; `canonicalize` raises it to 21.

        Raises:
            NotLiftedError: It is older.
        """
        opset = self._graph.opset_imports.get("", 1)
        if opset < version:
            raise NotLiftedError(f"{what} needs opset {version}, not {opset}: canonicalize first")

    def discard(self) -> None:
        """Undo what was made: nothing may seem to read the values of the graph."""
        read = [value for node in self.nodes for value in node.inputs if value is not None]
        for node in self.nodes:
            node.resize_inputs(0)
        for value in [*read, *self._constants]:
            drop_if_unread(value)

    def type_results(self) -> None:
        """Give each value the type and shape that follow from the node's own.

        ONNX knows nothing about the results of com.microsoft, they have to be inferred afterwards.
        """
        if self.node.domain:
            return
        for node in self.nodes:
            (source, scale), result = (*node.inputs, None)[:2], node.outputs[0]
            if node.op_type == "DequantizeLinear" and source is not None and scale is not None:
                result.dtype, result.shape = scale.dtype or ir.DataType.FLOAT, source.shape
            elif node.op_type not in _OTHER_TYPES and source is not None:
                result.type, result.shape = source.type, self.covered[-1].outputs[0].shape

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        outputs: int = 1,
    ) -> ir.Value:
        """Add a node of the standard domain; its first output.

        The first that computes floats has the name of the node whose place it takes.
        """
        made = ir.node(op_type, inputs, attributes or {}, num_outputs=outputs)
        is_pair = op_type in _PAIRS
        is_first = not is_pair and all(node.op_type in _PAIRS for node in self.nodes)
        made.name = self._stem if is_first else f"{self._stem}_{op_type}"
        decide(made, "qdq" if is_pair else "float", f"lifted from {self.node.op_type}")
        self.nodes.append(made)
        return made.outputs[0]

    def constant(
        self, stem: str, array: NDArray[Any], dtype: ir.DataType | None = None
    ) -> ir.Value:
        """A new initializer called after the node."""
        # Left to find out the type, onnx_ir takes a third of the time of a whole lifting for it.
        kind = dtype or ir.DataType.from_numpy(array.dtype)
        value = new_initializer(self._graph, f"{self._stem}_{stem}", array, kind)
        self._constants.append(value)
        return value

    def dequantize(
        self,
        stored: ir.Value | None,
        scale: ir.Value | None,
        zero_point: ir.Value | None,
        axis: int | None = None,
    ) -> ir.Value:
        """The floats that `stored` stands for.

        Args:
            stored: Integers.
            scale: One, or one per slice along `axis`.
            zero_point: One, one per slice, or None for zero.
            axis: Of a scale that has several elements; may count from the end.

        Raises:
            NotLiftedError: DequantizeLinear cannot express such a scale.
        """
        if stored is None or scale is None:
            raise NotLiftedError("an operand or its scale is missing")
        pair = self.parameters(scale, zero_point, axis)
        if axis is None or not _shape(pair[0]):
            return self.op("DequantizeLinear", [stored, *pair])
        rank = 0 if stored.shape is None or axis >= 0 else len(stored.shape)
        return self.op("DequantizeLinear", [stored, *pair], {"axis": axis + rank})

    def quantize(
        self, value: ir.Value, scale: ir.Value | None, zero_point: ir.Value | None, like: ir.Value
    ) -> ir.Value:
        """`value` stored at one scale.

        Args:
            value: Floats.
            scale: One.
            zero_point: One, or None for a zero of the type of `like`.
            like: Stored values of the type to be stored.

        Raises:
            NotLiftedError: A scale per slice, or a type that is not known.
        """
        if scale is None:
            raise NotLiftedError("the scale of its result is missing")
        if zero_point is None:
            if like.dtype is None:
                raise NotLiftedError("the type of its operands is unknown")
            zero_point = self.constant("zero_point", np.zeros((), like.dtype.numpy()))
        return self.op("QuantizeLinear", [value, *self.parameters(scale, zero_point, None)])

    def accumulator(
        self, stored: ir.Value, scales: Sequence[ir.Value | None], axis: int
    ) -> ir.Value:
        """An int32 bias, whose scale is the product of the two operands'.

        Raises:
            NotLiftedError: A scale that is computed.
        """
        arrays = [constant(scale) for scale in scales]
        if any(array is None for array in arrays):
            raise NotLiftedError("the scale of its bias is computed")
        first, second = (np.asarray(array, np.float32) for array in arrays)
        steps = (first * second).reshape(() if max(first.size, second.size) == 1 else -1)
        return self.dequantize(stored, self.constant("bias_scale", steps), None, axis)

    def parameters(
        self, scale: ir.Value, zero_point: ir.Value | None, axis: int | None
    ) -> list[ir.Value]:
        """Scale and zero point, both scalars or, if there is an axis, vectors along it.

        Raises:
            NotLiftedError: Several elements and no axis, or a size that is not known.
        """
        given = [scale] if zero_point is None else [scale, zero_point]
        sizes = [size_of(value) for value in given]
        if None in sizes:
            raise NotLiftedError("the shape of its scale or zero point is unknown")
        count = max(size for size in sizes if size is not None)
        if count > 1 and axis is None:
            raise NotLiftedError(f"its scale or zero point has {count} elements, not one")
        if any(max(_shape(value) or (1,)) not in (1, count) for value in given):
            raise NotLiftedError("its scales lie along more than one axis")
        return [self._shaped(value, () if count == 1 else (count,)) for value in given]

    def _shaped(self, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        """A scale or zero point in one shape; ORT's ops take [1] for a scalar and the reverse."""
        if _shape(value) == shape:
            return value
        array = constant(value)
        if array is not None:
            flat = np.broadcast_to(array.reshape(-1), shape or (1,)).reshape(shape)
            return self._reshaped(value, np.ascontiguousarray(flat))
        if shape:
            raise NotLiftedError("its scale or zero point is computed, and repeated for each slice")
        return self.op("Squeeze", [value])

    def _reshaped(self, value: ir.Value, array: NDArray[Any]) -> ir.Value:
        """The initializer that holds `array`, one for all who read `value` in that shape."""
        known: dict[tuple[int, ...], ir.Value] = value.meta.setdefault("qcompiler.shaped", {})
        shared = known.get(array.shape)
        if shared is None or shared.graph is None:  # or discarded with a form that came to nothing
            shared = known[array.shape] = self.constant(value.name or "scale", array)
        return shared


def size_of(value: ir.Value) -> int | None:
    """The number of elements of a value, if it is known."""
    shape = _shape(value)
    return None if shape is None else math.prod(shape)


def _shape(value: ir.Value) -> tuple[int, ...] | None:
    maker = value.producer()
    if maker is not None and maker.op_type == "DynamicQuantizeLinear":
        return ()  # also where nothing is known about its input
    if value.shape is None or not value.shape.is_static():
        return None
    return tuple(value.shape.numpy())
