"""Decide, node by node, what is quantized to what; nothing in the graph changes yet.

1. MatMul by a constant matrix: the scheme's weight type, per channel or per group along K, and its
   activation type per token, dynamic.
2. Conv by a constant kernel: the scheme's weight type per output channel, static activations.
3. Everything else stays float, with the reason.
"""

from __future__ import annotations

import fnmatch

import onnx_ir as ir

from qcompiler.ir.decisions import NodePlan, decide, set_plan
from qcompiler.ir.errors import OptionError, did_you_mean
from qcompiler.ir.types import PerAxis, PerGroup, PerTensor, QuantSpec, QuantType
from qcompiler.targets.target import Scheme

__all__ = ["SENSITIVE", "AssignPrecision"]

SENSITIVE = frozenset(
    {
        "Softmax",
        "LogSoftmax",
        "LayerNormalization",
        "RMSNormalization",
        "SimplifiedLayerNormalization",
        "GroupNormalization",
        "InstanceNormalization",
        "BatchNormalization",
        "ReduceMean",
        "ReduceSum",
        "Exp",
        "Log",
        "Pow",
        "Sqrt",
        "Erf",
        "Gelu",
        "Sigmoid",
        "Tanh",
    }
)
"""Ops whose error grows when their inputs are rounded to 8 bits; they stay float."""

_NOT_YET = frozenset(
    {
        "Gather",
        "ConvTranspose",
        "LSTM",
        "GRU",
        "RNN",
        "Attention",
        "Einsum",
        "Gemm",
    }
)


class AssignPrecision(ir.passes.InPlacePass):
    """Attach a `NodePlan` to each node that is to be quantized.

    Attributes:
        scheme: The target's number formats.
        keep_float: Node names, op types or shell patterns of either that stay float.
        group_size: Elements per weight scale instead of the scheme's own choice.
    """

    def __init__(
        self, scheme: Scheme, keep_float: tuple[str, ...] = (), group_size: int | None = None
    ) -> None:
        """Take the facts.

        Raises:
            OptionError: A group size for a scheme whose weights have no groups.
        """
        super().__init__()
        if group_size is not None and not scheme.group_sizes:
            raise OptionError(
                f"group_size {group_size}: {scheme.name} weights have one scale per channel; "
                "leave it out, or choose an int4 target"
            )
        self.scheme = scheme
        self.keep_float = keep_float
        self.group_sizes = (group_size,) if group_size else scheme.group_sizes

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Plan every node of the graph and its subgraphs."""
        nodes = list(model.graph.all_nodes())
        self._check_patterns(nodes)
        planned = 0
        for node in nodes:
            plan = self._plan(node)
            if isinstance(plan, NodePlan):
                set_plan(node, plan)
                decide(node, "qdq", str(plan))
                planned += 1
            elif plan is not None:
                decide(node, "float", plan)
        return ir.passes.PassResult(model, planned > 0)

    def _check_patterns(self, nodes: list[ir.Node]) -> None:
        names = [node.name or "" for node in nodes] + sorted({node.op_type for node in nodes})
        for pattern in self.keep_float:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise OptionError(
                    f"keep_float {pattern!r} matches no node name and no op type of the model"
                    f"{did_you_mean(pattern, names)}"
                )

    def _plan(self, node: ir.Node) -> NodePlan | str | None:
        """A plan, the reason to stay float, or None for ops that hold nothing to quantize."""
        for pattern in self.keep_float:
            if any(fnmatch.fnmatchcase(n, pattern) for n in (node.name or "", node.op_type)):
                return f"kept float by request ({pattern})"
        if node.domain not in ("", "ai.onnx"):
            return f"op of the foreign domain {node.domain}"
        match node.op_type:
            case "MatMul":
                return self._plan_matmul(node)
            case "Conv":
                return self._plan_conv(node)
            case op if op in SENSITIVE:
                return f"{op} is sensitive: kept in FP32"
            case op if op in _NOT_YET:
                return f"no quantized form of {op} yet"
        return None

    def _plan_matmul(self, node: ir.Node) -> NodePlan | str:
        weight, scheme = node.inputs[1], self.scheme
        if (reason := _not_a_weight(weight) or _not_float(node.inputs[0])) is not None:
            return reason
        assert weight is not None and weight.const_value is not None
        shape = weight.const_value.shape.numpy()
        if len(shape) != 2:
            return f"its weight has rank {len(shape)}, only matrices are quantized yet"
        depth = shape[0]
        activation = None
        if scheme.activation is not None:
            stored = QuantType(scheme.activation, granularity=PerGroup(-1, depth))
            activation = QuantSpec(stored, "dynamic")
        if not self.group_sizes:
            return NodePlan(_per_channel(scheme.weight, axis=1), activation)
        size = next((size for size in self.group_sizes if depth % size == 0), None)
        if size is None:
            return f"K={depth} is a multiple of no group size in {self.group_sizes}"
        return NodePlan(QuantType(scheme.weight, granularity=PerGroup(0, size)), activation)

    def _plan_conv(self, node: ir.Node) -> NodePlan | str:
        scheme = self.scheme
        if scheme.conv_weight is None:
            return f"{scheme.name} keeps convolutions float"
        operands = [_not_a_weight(value) for value in node.inputs[1:] if value is not None]
        for reason in [*operands, _not_float(node.inputs[0])]:
            if reason is not None:
                return reason
        if node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
            return "no quantized form of Conv with auto_pad yet"
        if node.outputs[0].is_graph_output():
            return "its result leaves the graph"
        activation = QuantSpec(
            QuantType(scheme.conv_activation, granularity=PerTensor(), symmetric=False), "static"
        )
        return NodePlan(_per_channel(scheme.conv_weight, axis=0), activation, output=activation)


def _per_channel(storage: ir.DataType, axis: int) -> QuantType:
    # -128 has no counterpart: leaving it out costs 0.05 dB and keeps every product negatable.
    narrow = storage is ir.DataType.INT8
    return QuantType(storage, granularity=PerAxis(axis), narrow_range=narrow)


def _not_float(value: ir.Value | None) -> str | None:
    if value is None or value.dtype is not ir.DataType.FLOAT:
        dtype = "unknown" if value is None or value.dtype is None else value.dtype.name
        return f"its input is {dtype}, only FLOAT is quantized"
    if value.shape is not None and len(value.shape) < 2:
        # ORT takes the one scale of a vector for a per-tensor one and refuses its block size.
        return "its input is a vector, only batches of them are quantized"
    return None


def _not_a_weight(value: ir.Value | None) -> str | None:
    if value is None or value.const_value is None or value.is_graph_input():
        return "its second operand is an activation: no quantized form yet"
    if value.const_value.dtype is not ir.DataType.FLOAT:
        return f"its weight is {value.const_value.dtype.name}, only FLOAT is quantized"
    return None
