"""Decide, node by node, what is quantized to what; nothing in the graph changes yet.

1. MatMul by a constant matrix: the scheme's weight type, per channel or per group along K, and its
   activation type per token, dynamic; or static, per tensor, if a rule asks for that.
2. Conv and ConvTranspose by a constant kernel: the scheme's weight type per output channel, static
   activations.  The last layers of a network are known by where their results go: one that leaves
   the graph is not rounded, unless asked for, as nothing that follows would average out the error.
3. MatMul of two activations: left float, or static, if asked for.
4. Gather of a constant matrix's rows: 8 or 4 bits if a rule asks for them.
5. Everything else stays float, with the reason; so does all that a quantized source keeps float:
   whoever quantized it knew why, and its results are what is asked for.

Rules of a recipe (`node_rules`) choose another of the forms that an op has (`forms`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.ir.decisions import (
    NO_WEIGHTS,
    NodePlan,
    OperandPlan,
    add_note,
    decide,
    decision_of,
    is_kept_float,
    keep_float,
    operand_plan_of,
    plan_of,
    set_operand_plan,
    set_plan,
)
from qcompiler.ir.errors import OptionError, did_you_mean
from qcompiler.ir.graph import constant, dequantize_of, drop_if_unread, new_initializer, rectified
from qcompiler.ir.types import PerAxis, PerGroup, PerTensor, QuantSpec, QuantType
from qcompiler.passes.conv_pads import explicit_pads
from qcompiler.passes.forms import Form, form_of
from qcompiler.passes.lower_convolutions import no_convolution_of
from qcompiler.passes.node_rules import (
    PRECISIONS,
    ROUNDINGS,
    NodeRule,
    NodeRules,
    check_group_size,
    matches,
    names_of,
)
from qcompiler.targets.target import Scheme

__all__ = ["AssignPrecision"]

_SENSITIVE = frozenset({
    "Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization", "GroupNormalization",
    "InstanceNormalization", "BatchNormalization", "ReduceMean", "ReduceSum", "Exp", "Log", "Pow",
    "Sqrt", "Erf", "Gelu", "Sigmoid", "Tanh",
})  # fmt: skip
"""Ops whose error grows when their inputs are rounded to 8 bits."""

_QUANTIZATION = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})

_NOT_YET = {"LSTM": False, "GRU": False, "RNN": False,
            "Einsum": False, "Gemm": False}  # fmt: skip
"""Ops with weights of their own that have no quantized form yet, and whether users expect that."""


_MATMUL_NOW = "; a Gemm is a MatMul of the same name and an Add by then: give that name, or MatMul"


@dataclasses.dataclass(frozen=True)
class _Float:
    """The reason for a node to stay float; not expected where quantizing it was the point."""

    why: str
    expected: bool = True


_UNSEEN = "static ranges are not observed inside branches and loops"
_IMPORTED = _Float("already quantized in the source: left to ORT as it is")


class AssignPrecision(ir.passes.InPlacePass):
    """Attach a `NodePlan` to each node that is to be quantized.

    Attributes:
        scheme: The target's number formats.
        options: What to do differently from the scheme.
        rules: What to do differently at some nodes; `keep_float` has the last word.
        notes: What the user should know of the rules, after the pass ran.
    """

    @dataclasses.dataclass(frozen=True)
    class Options:
        """What to do differently from the scheme.

        Attributes:
            keep_float: Node names, op types or patterns of either that stay float.
            group_size: Weights per scale where a scheme has groups; by default its own choice.
            products: Let MatMuls of two activations multiply 8 bits, with static scales.
            outputs: Round convolutions whose results leave the graph, too.
            rounding: How the weights of products are rounded: "nearest", "hqq", or, with samples,
                "awq", "gptq" or both, "awq_gptq".
        """

        keep_float: tuple[str, ...] = ()
        group_size: int | None = None
        products: bool = False
        outputs: bool = False
        rounding: str = "nearest"

        def __post_init__(self) -> None:
            """Check the values.

            Raises:
                OptionError: Patterns that are no strings, a group size that is no power of two from
                    16 to 256, or no such rounding.
            """
            if self.rounding not in ROUNDINGS:
                hint = did_you_mean(str(self.rounding), ROUNDINGS)
                hint = hint or f"; one of {', '.join(ROUNDINGS)}"
                raise OptionError(f"unknown rounding {self.rounding!r}{hint}")
            keep = self.keep_float
            listed = isinstance(keep, Sequence) and not isinstance(keep, str)
            if not listed or not all(isinstance(pattern, str) for pattern in keep):
                raise OptionError(f"keep_float must be a list of strings, not {keep!r}")
            check_group_size(self.group_size)

    def __init__(
        self, scheme: Scheme, options: Options | None = None, rules: Sequence[NodeRule] = ()
    ) -> None:
        super().__init__()
        self.scheme, self.rules = scheme, rules
        self.options = options or self.Options()
        self.notes: tuple[str, ...] = ()
        self._patterns: tuple[str, ...] = ()
        self._asked = NodeRules((), ())

    @property
    def options(self) -> Options:
        """What to do differently from the scheme.

        Raises:
            OptionError: When set: a group size for a scheme whose weights have no groups.
        """
        return self._options

    @options.setter
    def options(self, options: Options) -> None:
        grouped = self.scheme.group_sizes or any(rule.precision == "int4" for rule in self.rules)
        if options.group_size is not None and not grouped:
            raise OptionError(
                f"group_size {options.group_size}: {self.scheme.name} weights have one scale per "
                "channel; leave it out, or choose an int4 target"
            )
        self._options = options

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Elements per weight scale, in order of preference."""
        size = self.options.group_size
        return (size,) if size else self.scheme.group_sizes

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Plan every node of the graph and its subgraphs.

        Raises:
            OptionError: A pattern or a rule that is about no node, or that no node can follow.
        """
        nodes = list(model.graph.all_nodes())
        self._patterns = self._known_patterns(nodes)
        self._asked = NodeRules(self.rules, nodes)
        changed, is_quantized = False, any(node.op_type in _QUANTIZATION for node in nodes)
        if is_quantized:
            self._check_nothing_asked()
        for node in nodes:
            plan = self._plan_tied(model.graph, node, in_branch=node.graph is not model.graph)
            if isinstance(plan, NodePlan | OperandPlan) and is_quantized:
                decide(node, "float", "the source is quantized, and keeps this op float")
            elif isinstance(plan, OperandPlan):
                changed = changed or operand_plan_of(node) != plan
                set_operand_plan(node, plan)
                decide(node, "qdq", f"both its operands {plan.operands}")
            elif isinstance(plan, NodePlan):
                changed = changed or plan_of(node) != plan
                set_plan(node, plan)
                decide(node, "qdq", str(plan))
            elif plan is not None and is_kept_float(node):
                decide(node, "float", plan.why)
            elif plan is not None and decision_of(node).action != "qdq":
                # What was imported quantized, and is left so, has its reason already.
                decide(node, "float", plan.why, expected=plan.expected)
            if not isinstance(plan, NodePlan):
                self._refuse_all(node, plan.why if isinstance(plan, _Float) else NO_WEIGHTS)
        self.notes = self._asked.check()
        return ir.passes.PassResult(model, changed)

    def _check_nothing_asked(self) -> None:
        """Refuse requests about what is quantized already."""
        given = [f"keep_float {pattern!r}" for pattern in self.options.keep_float]
        given += [f"recipe: rule 1 ({rule})" for rule in self.rules[:1]]
        if given:
            raise OptionError(
                f"{given[0]}: the source is quantized already, and its nodes are what they are in "
                "it; leave it out, or start from the float model"
            )

    def _refuse_all(self, node: ir.Node, why: str) -> None:
        """Say that a node that stays float does nothing that rules ask for but that."""
        asked = self._asked.about(node)
        if asked is not None and asked.precision != "float":
            for key in asked.says:
                self._asked.refuse(node, key, why)

    def _form(self, node: ir.Node) -> Form:
        """The form of a node that can be quantized; what rules ask for in vain is noted on it."""
        asked = self._asked.about(node)

        def refuse(key: str, why: str) -> None:
            self._asked.refuse(node, key, why)
            add_note(node, f"{key} {getattr(asked, key)!r} of the recipe is not possible: {why}")

        return form_of(
            node.op_type, self.scheme, asked, self.group_sizes, self.options.rounding, refuse
        )

    def _known_patterns(self, nodes: list[ir.Node]) -> tuple[str, ...]:
        """`keep_float`, each pattern of which matches something.

        "a + b" is what reports call products that were merged: both are meant.
        """
        names = list(dict.fromkeys(name for node in nodes for name in names_of(node)))
        names += sorted({node.op_type for node in nodes})
        patterns = list[str]()
        for given in self.options.keep_float:
            patterns += [given] if given in names else given.split(" + ")
        for pattern in patterns:
            if not any(matches(name, pattern) for name in names):
                raise OptionError(
                    f"keep_float {pattern!r} matches no node name and no op type of the model"
                    f"{_MATMUL_NOW if pattern == 'Gemm' else did_you_mean(pattern, names)}"
                )
        return tuple(patterns)

    def _plan_tied(
        self, graph: ir.Graph, node: ir.Node, in_branch: bool
    ) -> NodePlan | OperandPlan | _Float | None:
        """The plan of a node; MatMul(x, Transpose(W)) becomes MatMul(x, W') if that has one.

        Folding constants leaves such a Transpose if W has other readers, as an embedding that is
        the last weight too: a float copy of it would make the model grow.
        """
        turn = _transpose_of_weight(node)
        if turn is None:
            return self._plan(node, in_branch)
        array = constant(turn.inputs[0])
        assert array is not None and turn.inputs[0] is not None
        turned = new_initializer(graph, f"{turn.inputs[0].name}_transposed", array.T)
        node.replace_input_with(1, turned)
        plan = self._plan(node, in_branch)
        if not isinstance(plan, NodePlan):
            node.replace_input_with(1, turn.outputs[0])
            drop_if_unread(turned)
        elif not turn.outputs[0].uses() and turn.graph is not None:
            turn.graph.remove(turn)
        return plan

    def _plan(self, node: ir.Node, in_branch: bool) -> NodePlan | OperandPlan | _Float | None:
        """A plan, the reason to stay float, or None for ops that hold nothing to quantize."""
        for pattern in self._patterns:
            if any(matches(name, pattern) for name in (*names_of(node), node.op_type)):
                self._asked.overrule(node)
                return _kept(node, pattern)
        asked = self._asked.about(node)
        if asked is not None and asked.precision == "float":
            return _kept(node, "precision")
        if node.domain not in ("", "ai.onnx"):
            return _Float(f"op of the foreign domain {node.domain}")
        match node.op_type:
            case "MatMul":
                return self._plan_matmul(node, in_branch)
            case "Conv" | "ConvTranspose":
                return self._plan_conv(node, in_branch)
            case op if op in _SENSITIVE:
                return _Float(f"{op} is sensitive: not rounded to 8 bits")
            case "Gather" if _has_float_constant(node):
                return self._plan_table(node, in_branch)
            case op if op in _NOT_YET and _has_float_constant(node):
                return _Float(f"no quantized form of {op} yet", _NOT_YET[op])
        return None

    def _plan_matmul(self, node: ir.Node, in_branch: bool) -> NodePlan | OperandPlan | _Float:
        weight = node.inputs[1]
        if self.options.products and not any(_is_constant(value) for value in node.inputs):
            return self._plan_product(node, in_branch)
        if _no_weight(node.inputs[0]) is None:
            return _Float("its weight is on the left, only right operands are quantized", False)
        if (reason := _no_weight(weight) or _no_batch_of_floats(node.inputs[0])) is not None:
            return reason
        assert weight is not None and weight.const_value is not None
        shape = weight.const_value.shape.numpy()
        if len(shape) != 2 or 0 in shape:
            return _Float(f"its weight has shape {list(shape)}, only matrices are quantized", False)
        form, depth = self._form(node), shape[0]
        if in_branch and form.group_sizes:
            # Making MatMulNBits of it, ORT 1.31 looks for the weight inside the branch and fails.
            return _Float("ORT does not find int4 weights from inside a branch", False)
        if in_branch and form.rounding not in ("nearest", "hqq"):
            add_note(node, f"rounded to nearest, not by {form.rounding}: inside of a branch")
            form = dataclasses.replace(form, rounding="nearest")
        activation = None
        if form.activation == "dynamic":
            storage = form.weight if form.weight.is_floating_point() else ir.DataType.INT8
            stored = QuantType(storage, granularity=PerGroup(-1, depth))
            activation = QuantSpec(stored, "dynamic")
        if form.activation == "static":
            if in_branch:
                return _Float(_UNSEEN, False)
            activation = self._static()
        if not form.group_sizes:
            return _node_plan(form, _per_channel(form.weight, axis=1), activation)
        # Where none divides K, the last group is shorter: ONNX and ORT's MatMulNBits know that.
        divisors = (size for size in form.group_sizes if depth % size == 0)
        size = next(divisors, form.group_sizes[0])
        stored = QuantType(form.weight, granularity=PerGroup(0, size), symmetric=form.symmetric)
        return _node_plan(form, stored, activation)

    def _plan_product(self, node: ir.Node, in_branch: bool) -> OperandPlan | _Float:
        """MatMul of two activations: ORT's MatMulIntegerToFloat."""
        if in_branch:
            return _Float(_UNSEEN, False)
        for value in node.inputs:
            if (reason := _no_batch_of_floats(value)) is not None:
                return reason
        return OperandPlan(self._static(), None)

    def _static(self) -> QuantSpec:
        stored = QuantType(self.scheme.conv_activation, granularity=PerTensor(), symmetric=False)
        return QuantSpec(stored, "static")

    def _plan_table(self, node: ir.Node, in_branch: bool) -> NodePlan | _Float:
        """A table is rounded where a rule names its precision: what it costs is seen by nobody."""
        asked, table = self._asked.about(node), constant(node.inputs[0])
        storage = None if asked is None or asked.precision is None else PRECISIONS[asked.precision]
        if asked is None or storage is None:
            return _Float("a table stays float unless a rule of the recipe names its precision")
        if storage.is_floating_point():
            return _Float("tables are int8, int4 or float", False)
        if table is None or table.ndim != 2 or table.dtype != np.float32 or 0 in table.shape:
            return _Float("only tables that are matrices of FLOAT are rounded", False)
        if in_branch or node.attributes.get_int("axis", 0) not in (0, -2):
            return _Float("only rows of the main graph's tables are rounded", False)
        for key in set(asked.says) - {"precision", "group_size"}:
            self._asked.refuse(node, key, "a table is looked up, and multiplied by nothing")
        if storage is ir.DataType.INT8:
            if asked.group_size is not None:
                self._asked.refuse(node, "group_size", "int8 tables have a scale per row")
            return NodePlan(_per_channel(storage, axis=0), None, requested=True)
        sizes = (asked.group_size,) if asked.group_size else self.group_sizes or (32,)
        size = next((size for size in sizes if table.shape[1] % size == 0), None)
        if size is None:
            return _Float(f"its rows of {table.shape[1]} are multiples of none of {sizes}", False)
        return NodePlan(QuantType(storage, granularity=PerGroup(1, size)), None, requested=True)

    def _plan_conv(self, node: ir.Node, in_branch: bool) -> NodePlan | _Float:
        scheme = self.scheme
        if scheme.conv_weight is None:
            return _Float(f"{scheme.name} keeps convolutions float")
        if in_branch:
            return _Float(_UNSEEN, False)
        operands = [_no_weight(value) for value in node.inputs[1:] if value is not None]
        imported = _IMPORTED if dequantize_of(node.inputs[0]) is not None else None
        for reason in [*operands, imported, _not_float(node.inputs[0]), _no_form(node)]:
            if reason is not None:
                return reason
        if rectified(node.outputs[0]).is_graph_output() and not self.options.outputs:
            return _Float("its result leaves the graph")
        activation, axis = self._static(), int(node.op_type == "ConvTranspose")
        form = self._form(node)
        return _node_plan(form, _per_channel(form.weight, axis), activation, activation)


def _node_plan(
    form: Form, weight: QuantType, activation: QuantSpec | None, output: QuantSpec | None = None
) -> NodePlan:
    return NodePlan(weight, activation, output, form.calibration, form.rounding, form.requested)


def _kept(node: ir.Node, why: str) -> _Float:
    keep_float(node, f"kept float by request ({why})")
    return _Float(f"kept float by request ({why})")


def _no_form(node: ir.Node) -> _Float | None:
    """Why a convolution has no integer form in ONNX Runtime."""
    weight = constant(node.inputs[1])
    assert weight is not None
    if weight.ndim < 3 or 0 in weight.shape:
        return _Float(f"its weight has shape {list(weight.shape)}: no kernel of a convolution")
    if node.op_type == "ConvTranspose":
        why = no_convolution_of(node)
        # Small parts of a network, on which nothing depends.
        return None if why is None else _Float(f"no integer form of ConvTranspose: {why}")
    if explicit_pads(node, weight.shape[2:]) is None:
        return _Float("auto_pad, and what it pads depends on sizes that are not known", False)
    return None


def _transpose_of_weight(node: ir.Node) -> ir.Node | None:
    """The Transpose of a constant matrix that a MatMul has on its right."""
    value = node.inputs[1] if node.op_type == "MatMul" and node.domain == "" else None
    turn = value.producer() if value is not None else None
    if turn is None or turn.op_type != "Transpose" or value is None or value.is_graph_output():
        return None
    array = constant(turn.inputs[0])
    turns = list(turn.attributes.get_ints("perm", [1, 0])) == [1, 0]
    return turn if turns and array is not None and array.ndim == 2 else None


def _per_channel(storage: ir.DataType, axis: int) -> QuantType:
    # -128 has no counterpart: leaving it out costs 0.05 dB and keeps every product negatable.
    narrow = storage is ir.DataType.INT8
    return QuantType(storage, granularity=PerAxis(axis), narrow_range=narrow)


def _no_batch_of_floats(value: ir.Value | None) -> _Float | None:
    if (reason := _not_float(value)) is not None:
        return reason
    assert value is not None
    if dequantize_of(value) is not None:
        return _IMPORTED
    if value.shape is None:
        return _Float("the rank of its input is unknown", False)
    if len(value.shape) < 2:
        # ORT takes the one scale of a vector for a per-tensor one and refuses its block size.
        return _Float("its input is a vector, only batches of them are quantized", False)
    return None


def _not_float(value: ir.Value | None) -> _Float | None:
    if value is None or value.dtype is not ir.DataType.FLOAT:
        return _Float(f"its input is {_dtype_name(value)}, only FLOAT is quantized", False)
    return None


def _no_weight(value: ir.Value | None) -> _Float | None:
    if dequantize_of(value) is not None:
        return _IMPORTED
    if value is None or value.const_value is None or value.is_graph_input():
        return _Float("its second operand is an activation: no quantized form yet")
    if value.const_value.dtype is not ir.DataType.FLOAT:
        return _Float(f"its weight is {_dtype_name(value)}, only FLOAT is quantized", False)
    return None


def _is_constant(value: ir.Value | None) -> bool:
    node = dequantize_of(value)
    return constant(value if node is None else node.inputs[0]) is not None


def _has_float_constant(node: ir.Node) -> bool:
    tensors = [value.const_value for value in node.inputs if value is not None]
    return any(tensor is not None and tensor.dtype.is_floating_point() for tensor in tensors)


def _dtype_name(value: ir.Value | None) -> str:
    return "an unknown type" if value is None or value.dtype is None else value.dtype.name
