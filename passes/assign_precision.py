"""Decide, node by node, what is quantized to what; nothing in the graph changes yet.

1. MatMul by a constant matrix: the scheme's weight type, per channel or per group along K, and its
   activation type per token, dynamic; or static, per tensor, if a rule asks for that.
2. Conv and ConvTranspose by a constant kernel: the scheme's weight type per output channel, static
   activations.  The last layers of a network are known by where their results go: one that leaves
   the graph, as it is or through what averages nothing (`last_values`), is not rounded, unless
   asked for.  Nor is what a logarithm is taken of (`logged_values`), nor in 1.
3. MatMul of two activations: left float, or static, if asked for.
4. Gather of a constant matrix's rows: 8 or 4 bits if a rule asks for them.
5. Everything else stays float, with the reason; so does all that a quantized source keeps float:
   whoever quantized it knew why, and its results are what is asked for.

Rules of a recipe (`node_rules`) choose another of the forms that an op has (`forms`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from qcompiler.ir.decisions import (
    NO_WEIGHTS,
    NodePlan,
    OperandPlan,
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
from qcompiler.ir.graph import constant, drop_if_unread, every_node, new_initializer
from qcompiler.passes.forms import Usual, check_usual
from qcompiler.passes.last_values import last_values
from qcompiler.passes.logged_values import logged_values
from qcompiler.passes.node_names import check_pattern, matches, names_of
from qcompiler.passes.node_plans import NodePlanner, StayFloat
from qcompiler.passes.node_rules import (
    PRECISIONS,
    NodeRule,
    NodeRules,
    check_group_size,
    check_word,
)
from qcompiler.targets.target import Scheme

__all__ = ["AssignPrecision"]

_QUANTIZATION = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})

_MATMUL_NOW = "; a Gemm is a MatMul of the same name and an Add by then: give that name, or MatMul"


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
            group_size: Weights per scale where a scheme has groups, 0 for one scale per channel; by
                default its own choice.
            products: Let MatMuls of two activations multiply 8 bits, with static scales.
            outputs: Round convolutions whose results leave the graph, too.
            rounding: How the weights of products are rounded: "nearest", "hqq", or, with samples,
                "awq", "gptq" or both, "awq_gptq".
            zero_points: Of groups of int4 weights: "none", "integer" or "float"; by default the
                scheme's own choice.
            scales: Of groups, and their float zero points: "float", or "int8" times a float per
                channel.
        """

        keep_float: tuple[str, ...] = ()
        group_size: int | None = None
        products: bool = False
        outputs: bool = False
        rounding: str = "nearest"
        zero_points: str | None = None
        scales: str = "float"

        def __post_init__(self) -> None:
            """Check the values.

            Raises:
                OptionError: Patterns that are no strings, a group size that is no power of two from
                    16 to 256 and not 0, no such rounding, zero points or scales, or scales of
                    8 bits beside integer zero points.
            """
            check_word("rounding", self.rounding)
            check_word("scales", self.scales)
            if self.zero_points is not None:
                check_word("zero_points", self.zero_points)
            if (self.zero_points, self.scales) == ("integer", "int8"):
                raise OptionError(
                    'scales "int8" have no integer zero points beside them: choose zero_points '
                    '"float", or scales "float"'
                )
            keep = self.keep_float
            listed = isinstance(keep, Sequence) and not isinstance(keep, str)
            if not listed or not all(isinstance(pattern, str) for pattern in keep):
                raise OptionError(f"keep_float must be a list of strings, not {keep!r}")
            for pattern in keep:
                check_pattern("keep_float", pattern)
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
            OptionError: When set: a group size or zero points for a scheme whose weights have no
                groups, or another rounding than to nearest for one whose weights are floats.
        """
        return self._options

    @options.setter
    def options(self, options: Options) -> None:
        asked = [PRECISIONS.get(rule.precision or "") for rule in self.rules]
        check_usual(
            self.scheme, asked, options.group_size, options.zero_points, options.scales,
            options.rounding,
        )  # fmt: skip
        self._options = options

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Elements per weight scale, in order of preference."""
        size = self.options.group_size
        return self.scheme.group_sizes if size is None else (size,)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Plan every node of the graph and its subgraphs.

        Raises:
            OptionError: A pattern or a rule that is about no node, or that no node can follow.
        """
        nodes = list(every_node(model.graph))
        self._patterns = self._known_patterns(nodes)
        self._asked = NodeRules(self.rules, nodes)
        is_quantized = any(map(_came_quantized, nodes))
        if is_quantized:
            self._check_nothing_asked()
        changed, planner = False, self._planner(model.graph)
        for node in nodes:
            plan = self._plan_tied(planner, model.graph, node)
            if isinstance(plan, NodePlan | OperandPlan) and is_quantized:
                decide(node, "float", "the source is quantized, and keeps this op float")
            else:
                changed |= _note_plan(node, plan)
            if not isinstance(plan, NodePlan):
                self._refuse_all(node, plan.why if isinstance(plan, StayFloat) else NO_WEIGHTS)
        self.notes = self._asked.check()
        return ir.passes.PassResult(model, changed)

    def _planner(self, graph: ir.Graph) -> NodePlanner:
        options = self.options
        zero_points = options.zero_points or self.scheme.zero_points
        usual = Usual(self.group_sizes, options.rounding, zero_points, options.scales)
        return NodePlanner(
            self.scheme, usual, options.products, options.outputs, last_values(graph),
            logged_values(graph), self._asked,
        )  # fmt: skip

    def _check_nothing_asked(self) -> None:
        """Refuse requests about what is quantized already."""
        given = [f"keep_float {pattern!r}" for pattern in self.options.keep_float]
        given += [f"recipe: rule 1 ({rule})" for rule in self.rules[:1]]
        for key, usual in (("rounding", "nearest"), ("zero_points", "none"), ("scales", "float")):
            if (value := getattr(self.options, key)) not in (None, usual):
                given.append(f"{key} {value!r}")
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
        self, planner: NodePlanner, graph: ir.Graph, node: ir.Node
    ) -> NodePlan | OperandPlan | StayFloat | None:
        """The plan of a node; MatMul(x, Transpose(W)) becomes MatMul(x, W') if that has one.

        Folding constants leaves such a Transpose if W has other readers, as an embedding that is
        the last weight too: a float copy of it would make the model grow.
        """
        turn, in_branch = _transpose_of_weight(node), node.graph is not graph
        if turn is None:
            return self._plan(planner, node, in_branch)
        array = constant(turn.inputs[0])
        assert array is not None and turn.inputs[0] is not None
        turned = new_initializer(graph, f"{turn.inputs[0].name}_transposed", array.T)
        node.replace_input_with(1, turned)
        plan = self._plan(planner, node, in_branch)
        if not isinstance(plan, NodePlan):
            node.replace_input_with(1, turn.outputs[0])
            drop_if_unread(turned)
        elif not turn.outputs[0].uses() and turn.graph is not None:
            turn.graph.remove(turn, safe=True)
        return plan

    def _plan(
        self, planner: NodePlanner, node: ir.Node, in_branch: bool
    ) -> NodePlan | OperandPlan | StayFloat | None:
        """What `planner` says, unless somebody asked for floats."""
        for pattern in self._patterns:
            if any(matches(name, pattern) for name in (*names_of(node), node.op_type)):
                self._asked.overrule(node)
                return _kept(node, pattern)
        asked = self._asked.about(node)
        if asked is not None and asked.precision == "float":
            return _kept(node, "precision")
        return planner.plan(node, in_branch)


def _note_plan(node: ir.Node, plan: NodePlan | OperandPlan | StayFloat | None) -> bool:
    """Attach a plan, or the reason for none; whether that changes anything."""
    changed = False
    if isinstance(plan, OperandPlan):
        changed = operand_plan_of(node) != plan
        set_operand_plan(node, plan)
        decide(node, "qdq", f"both its operands {plan.operands}")
    elif isinstance(plan, NodePlan):
        changed = plan_of(node) != plan
        set_plan(node, plan)
        decide(node, "qdq", str(plan))
    elif plan is not None and is_kept_float(node):
        decide(node, "float", plan.why)
    elif plan is not None and decision_of(node).action != "qdq":
        # What was imported quantized, and is left so, has its reason already.
        decide(node, "float", plan.why, expected=plan.expected)
    return changed


def _came_quantized(node: ir.Node) -> bool:
    """Whether a node says that whoever made the model quantized it; ORT's own ops say so too."""
    not_lifted = node.domain == "com.microsoft" and decision_of(node).action == "qdq"
    return node.op_type in _QUANTIZATION or not_lifted


def _kept(node: ir.Node, why: str) -> StayFloat:
    keep_float(node, f"kept float by request ({why})")
    return StayFloat(f"kept float by request ({why})")


def _transpose_of_weight(node: ir.Node) -> ir.Node | None:
    """The Transpose of a constant matrix that a MatMul has on its right."""
    value = node.inputs[1] if node.op_type == "MatMul" and node.domain == "" else None
    turn = value.producer() if value is not None else None
    if turn is None or turn.op_type != "Transpose" or value is None or value.is_graph_output():
        return None
    array = constant(turn.inputs[0])
    turns = list(turn.attributes.get_ints("perm", [1, 0])) == [1, 0]
    return turn if turns and array is not None and array.ndim == 2 else None
