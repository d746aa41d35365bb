"""What each op can be quantized to: a plan, or the reason to stay float.

Part of `assign_precision`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.ir.decisions import NodePlan, OperandPlan, add_note
from qcompiler.ir.graph import constant, dequantize_of, rectified
from qcompiler.ir.types import PerAxis, PerGroup, PerTensor, QuantSpec, QuantType
from qcompiler.passes.conv_pads import explicit_pads
from qcompiler.passes.fold_image import no_image_kernel
from qcompiler.passes.forms import Form, Usual, form_of
from qcompiler.passes.node_rules import FEWER_BITS, PRECISIONS, NodeRules
from qcompiler.passes.sub_pixel import no_convolution_of
from qcompiler.targets.target import Scheme

__all__ = ["IMPORTED", "NodePlanner", "StayFloat"]

_SENSITIVE = frozenset({
    "Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization", "GroupNormalization",
    "InstanceNormalization", "BatchNormalization", "ReduceMean", "ReduceSum", "Exp", "Log", "Pow",
    "Sqrt", "Erf", "Gelu", "Sigmoid", "Tanh",
})  # fmt: skip
"""Ops whose error grows when their inputs are rounded to 8 bits."""

_NOT_YET = {"LSTM": False, "GRU": False, "RNN": False,
            "Einsum": False, "Gemm": False}  # fmt: skip
"""Ops with weights of their own that have no quantized form yet, and whether users expect that."""


@dataclasses.dataclass(frozen=True)
class StayFloat:
    """The reason for a node to stay float; not expected where quantizing it was the point."""

    why: str
    expected: bool = True


_UNSEEN = "static ranges are not observed inside branches and loops"
IMPORTED = "already quantized in the source: left to ORT as it is"
_IMPORTED = StayFloat(IMPORTED)
_LOGGED = StayFloat("a Log takes its result: there small values, which rounding loses, count too")


@dataclasses.dataclass(frozen=True)
class NodePlanner:
    """Plans single nodes.

    Attributes:
        scheme: The target's number formats.
        usual: What the weights of products are, where no rule says otherwise.
        products: Whether MatMuls of two activations are planned.
        outputs: Whether convolutions whose results leave the graph are.
        last: The values that its outputs are made of, see `last_values`.
        logged: The values of which a logarithm is taken, see `logged_values`.
        rules: What a recipe says of single nodes.
    """

    scheme: Scheme
    usual: Usual
    products: bool
    outputs: bool
    last: frozenset[ir.Value]
    logged: frozenset[ir.Value]
    rules: NodeRules

    def plan(self, node: ir.Node, in_branch: bool) -> NodePlan | OperandPlan | StayFloat | None:
        """A plan, the reason to stay float, or None for ops that hold nothing to quantize."""
        if node.domain not in ("", "ai.onnx"):
            return StayFloat(f"op of the foreign domain {node.domain}")
        match node.op_type:
            case "MatMul" | "Conv" if node.outputs[0] in self.logged and not self._is_asked(node):
                return _LOGGED
            case "MatMul":
                return self._plan_matmul(node, in_branch)
            case "Conv" | "ConvTranspose":
                return self._plan_conv(node, in_branch)
            case op if op in _SENSITIVE:
                return StayFloat(f"{op} is sensitive: not rounded to 8 bits")
            case "Gather" if _has_float_constant(node):
                return self._plan_table(node, in_branch)
            case op if op in _NOT_YET and _has_float_constant(node):
                return StayFloat(f"no quantized form of {op} yet", _NOT_YET[op])
        return None

    def _plan_matmul(self, node: ir.Node, in_branch: bool) -> NodePlan | OperandPlan | StayFloat:
        weight = node.inputs[1]
        if self.products and not any(_is_constant(value) for value in node.inputs):
            return self._plan_product(node, in_branch)
        if _no_weight(node.inputs[0]) is None:
            return StayFloat("its weight is on the left, only right operands are quantized", False)
        if (reason := _no_weight(weight) or _no_batch_of_floats(node.inputs[0])) is not None:
            return reason
        assert weight is not None and weight.const_value is not None
        shape = weight.const_value.shape.numpy()
        if len(shape) != 2 or 0 in shape:
            return StayFloat(
                f"its weight has shape {list(shape)}, only matrices are quantized", False
            )
        form, depth = self._form(node), shape[0]
        if in_branch and form.group_sizes:
            # Making MatMulNBits of it, ORT 1.31 looks for the weight inside the branch and fails.
            return StayFloat("ORT does not find int4 weights from inside a branch", False)
        if in_branch and form.rounding not in ("nearest", "hqq"):
            add_note(node, f"rounded to nearest, not by {form.rounding}: inside of a branch")
            form = dataclasses.replace(form, rounding="nearest")
        if in_branch and form.activation == "static":
            return StayFloat(_UNSEEN, False)
        if form.bits is not None and form.group_sizes:
            add_note(node, f"weights of {form.bits} bits, stored in int4")
        return _node_plan(form, _matrix_type(form, depth), self._activation(form, depth))

    def _activation(self, form: Form, depth: int) -> QuantSpec | None:
        """Of the left operand of a product, which has rows of `depth`."""
        if form.activation == "static":
            return self._static()
        if form.activation == "float":
            return None
        storage = form.weight if form.weight.is_floating_point() else ir.DataType.INT8
        return QuantSpec(QuantType(storage, granularity=PerGroup(-1, depth)), "dynamic")

    def _plan_product(self, node: ir.Node, in_branch: bool) -> OperandPlan | StayFloat:
        """MatMul of two activations: ORT's MatMulIntegerToFloat."""
        if in_branch:
            return StayFloat(_UNSEEN, False)
        for value in node.inputs:
            if (reason := _no_batch_of_floats(value)) is not None:
                return reason
        return OperandPlan(self._static(), None)

    def _static(self) -> QuantSpec:
        stored = QuantType(self.scheme.conv_activation, granularity=PerTensor(), symmetric=False)
        return QuantSpec(stored, "static")

    def _plan_table(self, node: ir.Node, in_branch: bool) -> NodePlan | StayFloat:
        """A table is rounded where a rule names its precision: what it costs is seen by nobody."""
        asked, table = self.rules.about(node), constant(node.inputs[0])
        storage = None if asked is None or asked.precision is None else PRECISIONS[asked.precision]
        if asked is None or storage is None:
            return StayFloat("a table stays float unless a rule of the recipe names its precision")
        if storage.is_floating_point() or asked.precision in FEWER_BITS:
            return StayFloat("tables are int8, int4 or float", False)
        if table is None or table.ndim != 2 or table.dtype != np.float32 or 0 in table.shape:
            return StayFloat("only tables that are matrices of FLOAT are rounded", False)
        if in_branch or node.attributes.get_int("axis", 0) not in (0, -2):
            return StayFloat("only rows of the main graph's tables are rounded", False)
        for key in set(asked.says) - {"precision", "group_size"}:
            self.rules.refuse(node, key, "a table is looked up, and multiplied by nothing")
        if storage is ir.DataType.INT8:
            if asked.group_size is not None:
                self.rules.refuse(node, "group_size", "int8 tables have a scale per row")
            return NodePlan(_per_channel(storage, axis=0), None, requested=True)
        if asked.group_size == 0:
            self.rules.refuse(node, "group_size", "the scales of int4 tables are of groups")
        sizes = (asked.group_size,) if asked.group_size else self.usual.group_sizes
        sizes = tuple(size for size in sizes if size) or (32,)
        size = next((size for size in sizes if table.shape[1] % size == 0), None)
        if size is None:
            return StayFloat(
                f"its rows of {table.shape[1]} are multiples of none of {sizes}", False
            )
        return NodePlan(QuantType(storage, granularity=PerGroup(1, size)), None, requested=True)

    def _plan_conv(self, node: ir.Node, in_branch: bool) -> NodePlan | StayFloat:
        scheme = self.scheme
        asked = self.rules.about(node)
        if scheme.conv_weight is None and (asked is None or asked.precision is None):
            return StayFloat(scheme.no_conv)
        if in_branch:
            return StayFloat(_UNSEEN, False)
        operands = [_no_weight(value) for value in node.inputs[1:] if value is not None]
        imported = _IMPORTED if dequantize_of(node.inputs[0]) is not None else None
        for reason in [*operands, imported, _not_float(node.inputs[0])]:
            if reason is not None:
                return reason
        if (without := _no_form(node)) is not None:
            return without
        if scheme.images and (why := _no_image(node)) is not None:
            return StayFloat(why)
        if (why := self._leaves(rectified(node.outputs[0]))) is not None and not self.outputs:
            return StayFloat(why)
        activation, axis = self._static(), int(node.op_type == "ConvTranspose")
        form = self._form(node)
        output = None if scheme.images else activation
        return _node_plan(form, _per_channel(form.weight, axis), activation, output)

    def _leaves(self, result: ir.Value) -> str | None:
        """How a result leaves the graph, if nothing that follows averages its errors out."""
        if result.is_graph_output():
            return "its result leaves the graph"
        if result not in self.last:
            return None
        readers = dict.fromkeys(use.node.op_type for use in result.uses() if use.node.outputs)
        return f"its result leaves the graph, or decides what does, through {', '.join(readers)}"

    def _is_asked(self, node: ir.Node) -> bool:
        """Whether a rule names the precision of a node."""
        asked = self.rules.about(node)
        return asked is not None and asked.precision is not None

    def _form(self, node: ir.Node) -> Form:
        """The form of a node that can be quantized; what rules ask for in vain is noted on it."""
        asked = self.rules.about(node)

        def refuse(key: str, why: str) -> None:
            self.rules.refuse(node, key, why)
            add_note(node, f"{key} {getattr(asked, key)!r} of the recipe is not possible: {why}")

        return form_of(node.op_type, self.scheme, asked, self.usual, refuse)


def _matrix_type(form: Form, depth: int) -> QuantType:
    """Of a weight [depth, N]."""
    if not form.group_sizes:
        return _per_channel(form.weight, axis=1)
    return QuantType(
        form.weight,
        granularity=PerGroup(0, _group_of(form.group_sizes, depth)),
        symmetric=form.zero_points != "integer",
        bits=form.bits,
        two_level=form.two_level,
        offset=form.zero_points == "float",
    )


def _group_of(sizes: Sequence[int], depth: int) -> int:
    """The first that divides K, else the first: a last group may be shorter in ONNX and in ORT."""
    size = next((size for size in sizes if size and depth % size == 0), sizes[0])
    # A channel is a group of all its weights; groups of ORT's op are powers of two.
    return size or max(16, 1 << (depth - 1).bit_length())


def _node_plan(
    form: Form, weight: QuantType, activation: QuantSpec | None, output: QuantSpec | None = None
) -> NodePlan:
    return NodePlan(weight, activation, output, form.calibration, form.rounding, form.requested)


def _no_form(node: ir.Node) -> StayFloat | None:
    """Why a convolution has no integer form in ONNX Runtime."""
    weight = constant(node.inputs[1])
    assert weight is not None
    if weight.ndim < 3 or 0 in weight.shape:
        return StayFloat(f"its weight has shape {list(weight.shape)}: no kernel of a convolution")
    if node.op_type == "ConvTranspose":
        why = no_convolution_of(node, weight.shape)
        # Small parts of a network, on which nothing depends.
        return None if why is None else StayFloat(f"no integer form of ConvTranspose: {why}")
    if explicit_pads(node, weight.shape[2:]) is None:
        return StayFloat("auto_pad, and what it pads depends on sizes that are not known", False)
    return None


def _no_image(node: ir.Node) -> str | None:
    """Why a convolution has no kernel on GPUs."""
    weight = constant(node.inputs[1])
    assert weight is not None
    if node.op_type == "ConvTranspose":
        return "no kernel for GPUs transposes a convolution"
    return no_image_kernel(weight.shape, node.attributes.get_int("group", 1))


def _per_channel(storage: ir.DataType, axis: int) -> QuantType:
    # -128 has no counterpart: leaving it out costs 0.05 dB and keeps every product negatable.
    narrow = storage is ir.DataType.INT8
    return QuantType(storage, granularity=PerAxis(axis), narrow_range=narrow)


def _no_batch_of_floats(value: ir.Value | None) -> StayFloat | None:
    if (reason := _not_float(value)) is not None:
        return reason
    assert value is not None
    if dequantize_of(value) is not None:
        return _IMPORTED
    if value.shape is None:
        return StayFloat("the rank of its input is unknown", False)
    if len(value.shape) < 2:
        # ORT takes the one scale of a vector for a per-tensor one and refuses its block size.
        return StayFloat("its input is a vector, only batches of them are quantized", False)
    return None


def _not_float(value: ir.Value | None) -> StayFloat | None:
    if value is None or value.dtype is not ir.DataType.FLOAT:
        return StayFloat(f"its input is {_dtype_name(value)}, only FLOAT is quantized", False)
    return None


def _no_weight(value: ir.Value | None) -> StayFloat | None:
    if dequantize_of(value) is not None:
        return _IMPORTED
    if value is None or value.const_value is None or value.is_graph_input():
        return StayFloat("its second operand is an activation: no quantized form yet")
    if value.const_value.dtype is not ir.DataType.FLOAT:
        return StayFloat(f"its weight is {_dtype_name(value)}, only FLOAT is quantized", False)
    return None


def _is_constant(value: ir.Value | None) -> bool:
    node = dequantize_of(value)
    return constant(value if node is None else node.inputs[0]) is not None


def _has_float_constant(node: ir.Node) -> bool:
    tensors = [value.const_value for value in node.inputs if value is not None]
    return any(tensor is not None and tensor.dtype.is_floating_point() for tensor in tensors)


def _dtype_name(value: ir.Value | None) -> str:
    return "an unknown type" if value is None or value.dtype is None else value.dtype.name
