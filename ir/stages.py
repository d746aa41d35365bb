"""The stages of a compilation and what each allows; checked after every pass.

float      canonical ONNX, nothing of ours
qdq        decisions are explicit Q/DQ pairs; still nothing of ours
quantized  pairs folded into ops of the `qcompiler` domain
kernel     regions outlined into a domain of their own

At every stage values are defined before they are read, initializers are what they are said to be,
each op of ai.onnx exists and takes what it is given (`onnx_rules`), results have the shapes that
follow (`shape_rules`), each Q and DQ has the operands that ONNX asks for (`qdq_rules`); where ops
of ours are allowed, they fit their signatures (`signature_rules`).
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence

import onnx
import onnx_ir as ir

from qcompiler.ir import dialect
from qcompiler.ir.decisions import region_of
from qcompiler.ir.errors import VerifyError
from qcompiler.ir.graph import bodies, every_node, label
from qcompiler.ir.onnx_rules import onnx_problems
from qcompiler.ir.qdq_rules import qdq_problems
from qcompiler.ir.shape_rules import shape_problems
from qcompiler.ir.signature_rules import signature_problems

__all__ = ["Interface", "Stage", "source_problems", "verify"]

_Problems = Iterator[tuple[str, str, str]]
"""The rule, the node and what is wrong with it."""


class Stage(enum.IntEnum):
    """How far down a model is."""

    FLOAT = 1
    QDQ = 2
    QUANTIZED = 3
    KERNEL = 4


@dataclasses.dataclass(frozen=True)
class Interface:
    """What callers feed and read, in order; inputs that have values of their own are none of it.

    And the opset of ai.onnx, in which ops mean what they mean.
    """

    inputs: tuple[str | None, ...]
    outputs: tuple[str | None, ...]
    opset: int

    @classmethod
    def of(cls, model: ir.Model) -> Interface:
        """That of a model."""
        fed = (v.name for v in model.graph.inputs if v.name not in model.graph.initializers)
        made = (value.name for value in model.graph.outputs)
        return cls(tuple(fed), tuple(made), model.graph.opset_imports.get("", 0))


def verify(
    model: ir.Model,
    stage: Stage,
    after: str,
    known: Collection[tuple[str, str]] | None = None,
    interface: Interface | None = None,
) -> None:
    """Check `model` against the rules of `stage`, in time linear in its nodes.

    Args:
        model: The model to check.
        stage: The stage it claims to be in.
        after: The pass that ran last, named in the message.
        known: The `source_problems` that there were before it; by default those rules are not
            looked at.
        interface: The inputs and outputs that there were before it, and that must be there still;
            by default that is not looked at.

    Raises:
        VerifyError: Names the pass, the node, what is wrong and the rule.
    """
    for rule, node, problem in _interface_problems(model, interface):
        raise _broken(rule, node, problem, stage, after)
    for rule, node, problem in _problems(model, stage):
        raise _broken(rule, node, problem, stage, after)
    if known is not None:
        for rule, node, problem in itertools.chain(onnx_problems(model), shape_problems(model)):
            if (rule, problem) not in known:
                raise _broken(rule, node, problem, stage, after)


def source_problems(model: ir.Model) -> set[tuple[str, str]]:
    """What a source has wrong and ONNX Runtime may still run: no pass is blamed for it."""
    found = itertools.chain(onnx_problems(model), shape_problems(model))
    return {(rule, problem) for rule, _, problem in found}


def _broken(rule: str, node: str, problem: str, stage: Stage, after: str) -> VerifyError:
    return VerifyError(
        f"after {after}: {node}: {problem} (rule {rule}, stage {stage.name.lower()})"
    )


def _problems(model: ir.Model, stage: Stage) -> _Problems:
    yield from _scopes(model.graph, {})
    yield from _known_ops(model, stage)
    yield from _typed_outputs(model)
    yield from _functions(model)
    yield from signature_problems(model)
    yield from qdq_problems(model)


def _interface_problems(model: ir.Model, before: Interface | None) -> _Problems:
    """Inputs and outputs keep their names and their order, and the opset does not fall."""
    now, owner = Interface.of(model), model.graph.name or "the graph"
    before = before or now
    if now.opset < before.opset:
        yield "opset", owner, f"its opset of ai.onnx was {before.opset}, and is {now.opset}"
    for kind, old, new in (
        ("inputs", before.inputs, now.inputs),
        ("outputs", before.outputs, now.outputs),
    ):
        if len(old) != len(new) or any(a and a != b for a, b in zip(old, new, strict=True)):
            said = f"its {kind} were {_listed(old, new)}, and are {_listed(new, old)}"
            yield "interface", owner, f"{said} (changes_interface = True in a pass allows it)"


def _listed(names: Sequence[str | None], others: Sequence[str | None]) -> str:
    """Names, from the first that differs on, four of them."""
    differs = [a != b for a, b in itertools.zip_longest(names, others)]
    first = differs.index(True)
    shown = [str(name) for name in names[first : first + 4]] or ["no more"]
    return ", ".join(["…"] * (first > 0) + shown + ["…"] * (len(names) > first + 4))


def _scopes(graph: ir.Graph, seen: dict[str, ir.Value]) -> _Problems:
    """Every value is defined before it is read, where it can be seen, under a name of its own.

    Args:
        graph: Whose values, and those of its subgraphs, are checked.
        seen: What can be seen from outside; the same again when the graph is done.
    """
    owner, defined = graph.name or "the graph", []

    def define(values: Iterable[ir.Value], by: str) -> _Problems:
        for value in values:
            if not value.name:
                yield "named", by, "a value has no name"
            elif value.name not in seen:
                seen[value.name] = value
                defined.append(value.name)
            elif seen[value.name] is not value:
                yield "unique-names", by, f"a second value is named {value.name!r}"

    yield from define([*graph.inputs, *graph.initializers.values()], owner)
    for constant in graph.initializers.values():
        if problem := _mistaken(constant):
            yield "initializers", owner, f"initializer {constant.name!r} {problem}"
    for node in graph:
        for value in node.inputs:
            if value is not None and seen.get(value.name or "") is not value:
                problem = f"reads {value.name!r} before it is defined"
                yield "defined-before-read", label(node), problem
        for body in bodies(node):
            yield from _scopes(body, seen)
        yield from define((value for value in node.outputs if value.name != ""), label(node))
    for value in graph.outputs:
        if seen.get(value.name or "") is not value:
            yield "defined-outputs", owner, f"output {value.name!r} is not defined"
    for name in defined:
        del seen[name]


def _mistaken(initializer: ir.Value) -> str | None:
    """What an initializer's value is not, that it is said to be."""
    tensor, said = initializer.const_value, initializer.shape
    if tensor is None:
        return "has no value"
    if initializer.dtype not in (None, tensor.dtype):
        return f"is {initializer.dtype}, its value {tensor.dtype}"
    if said is not None and not _may_be(said, tensor.shape):
        return f"has shape {said}, its value {tensor.shape}"
    return None


def _may_be(said: ir.Shape, shape: ir.ShapeProtocol) -> bool:
    sizes = list(shape)
    if len(said) != len(sizes):
        return False
    return all(not isinstance(a, int) or a == b for a, b in zip(said, sizes, strict=True))


def _known_ops(model: ir.Model, stage: Stage) -> _Problems:
    for node in every_node(model.graph):
        name = label(node)
        if node.domain not in model.graph.opset_imports:
            yield "imported-domains", name, f"domain {node.domain!r} is not imported"
        if not dialect.is_ours(node.domain):
            continue
        outlined = node.domain != dialect.DOMAIN
        if stage < Stage.QUANTIZED:
            yield "stage", name, f"{node.op_type} may not appear before folding"
        op = dialect.OPS.get(node.op_type.split("_")[0])
        if stage < Stage.KERNEL and (outlined or (op is not None and op.stage == "kernel")):
            yield "stage", name, f"{node.op_type} may not appear before outlining"
        if outlined and region_of(node) is None:
            yield "regions", name, f"{node.op_type} does not say what it computes"
        if node.op_identifier() not in model.functions:
            yield "bodies", name, f"{node.op_type} has no function body"


def _typed_outputs(model: ir.Model) -> _Problems:
    """ORT cannot infer through our ops when the library serves them: it needs value_info."""
    for node in every_node(model.graph):
        for value in node.outputs if dialect.is_ours(node.domain) else ():
            if value.dtype is None:
                problem = f"output {value.name!r} of {node.op_type} has no type"
                yield "typed-outputs", label(node), problem


def _functions(model: ir.Model) -> _Problems:
    opset = model.graph.opset_imports.get("")
    for function in model.functions.values():
        if not dialect.is_ours(function.domain):
            continue
        if function.opset_imports.get("") != opset:
            problem = f"function opset differs from the model's {opset}"
            yield "function-opset", function.name, problem
        for node in every_node(function):
            if node.domain != "":
                used = f"{node.domain}::{node.op_type}"
                problem = f"its body uses {used}; only ai.onnx may be used"
                yield "standard-bodies", function.name, problem
            elif not _exists(node.op_type, opset or 0):
                problem = f"its body uses {node.op_type}, which ai.onnx {opset} does not have"
                yield "standard-bodies", function.name, problem


def _exists(op: str, opset: int) -> bool:
    return onnx.defs.has(op, opset, "") and not onnx.defs.get_schema(op, opset, "").deprecated
