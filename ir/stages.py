"""The stages of a compilation and what each allows; checked after every pass.

float      canonical ONNX, nothing of ours
qdq        decisions are explicit Q/DQ pairs; still nothing of ours
quantized  pairs folded into ops of the `qcompiler` domain
kernel     regions outlined into a domain of their own
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

import onnx_ir as ir

from qcompiler.ir import dialect
from qcompiler.ir.decisions import region_of
from qcompiler.ir.errors import VerifyError

__all__ = ["Stage", "verify"]


class Stage(enum.IntEnum):
    """How far down a model is."""

    FLOAT = 1
    QDQ = 2
    QUANTIZED = 3
    KERNEL = 4


def verify(model: ir.Model, stage: Stage, after: str) -> None:
    """Check `model` against the rules of `stage`.

    Args:
        model: The model to check.
        stage: The stage it claims to be in.
        after: The pass that ran last, named in the message.

    Raises:
        VerifyError: Names the pass, the node and the broken rule.
    """
    for rule in (_scopes, _known_ops, _typed_outputs, _function_rules, _operand_types):
        for node_name, problem in rule(model, stage):
            raise VerifyError(f"after {after}: {node_name}: {problem} (stage {stage.name.lower()})")


_Problems = list[tuple[str, str]]


def _ours(domain: str) -> bool:
    return domain == dialect.DOMAIN or domain.startswith(f"{dialect.DOMAIN}.")


def _scopes(model: ir.Model, stage: Stage) -> _Problems:
    """Every value is defined before it is read, where it can be seen, under a name of its own."""
    problems: _Problems = []

    seen: dict[str, ir.Value] = {}

    def define(values: Iterable[ir.Value], here: list[str], owner: str) -> None:
        for value in values:
            if not value.name:
                problems.append((owner, "a value has no name"))
            elif value.name not in seen:
                seen[value.name] = value
                here.append(value.name)
            elif seen[value.name] is not value:
                problems.append((owner, f"a second value is named {value.name!r}"))

    def visit(graph: ir.Graph) -> None:
        here: list[str] = []
        owner = graph.name or "the graph"
        define([*graph.inputs, *graph.initializers.values()], here, owner)
        for node in graph:
            for value in node.inputs:
                if value is not None and seen.get(value.name or "") is not value:
                    problems.append((str(node.name), f"reads {value.name!r} before it is defined"))
            for attribute in node.attributes.values():
                if attribute.type is ir.AttributeType.GRAPH:
                    visit(attribute.as_graph())
            define((value for value in node.outputs if value.name != ""), here, str(node.name))
        for value in graph.outputs:
            if seen.get(value.name or "") is not value:
                problems.append((owner, f"output {value.name!r} is not defined"))
        for name in here:  # what is defined inside cannot be seen from outside
            del seen[name]

    visit(model.graph)
    return problems


def _known_ops(model: ir.Model, stage: Stage) -> _Problems:
    problems = []
    for node in model.graph.all_nodes():
        if node.domain not in model.graph.opset_imports:
            problems.append((str(node.name), f"domain {node.domain!r} is not imported"))
        if not _ours(node.domain):
            continue
        if stage < Stage.QUANTIZED:
            problems.append((str(node.name), f"{node.op_type} may not appear before folding"))
        if node.domain != dialect.DOMAIN and stage < Stage.KERNEL:
            problems.append((str(node.name), f"{node.op_type} may not appear before outlining"))
        if node.domain != dialect.DOMAIN and region_of(node) is None:
            problems.append((str(node.name), f"{node.op_type} does not say what it computes"))
        if node.op_identifier() not in model.functions:
            problems.append((str(node.name), f"{node.op_type} has no function body"))
    return problems


def _typed_outputs(model: ir.Model, stage: Stage) -> _Problems:
    """ORT cannot infer through our ops when the library serves them: it needs value_info."""
    return [
        (str(node.name), f"output {value.name!r} of {node.op_type} has no type")
        for node in model.graph.all_nodes()
        if _ours(node.domain)
        for value in node.outputs
        if value.dtype is None
    ]


def _function_rules(model: ir.Model, stage: Stage) -> _Problems:
    problems = []
    opset = model.graph.opset_imports.get("")
    for function in model.functions.values():
        if not _ours(function.domain):
            continue
        if function.opset_imports.get("") != opset:
            problems.append((function.name, f"function opset differs from the model's {opset}"))
        problems += [
            (
                function.name,
                f"its body uses {node.domain}::{node.op_type}; only ai.onnx may be used",
            )
            for node in function
            if node.domain != ""
        ]
    return problems


def _operand_types(model: ir.Model, stage: Stage) -> _Problems:
    problems = []
    for node in model.graph.all_nodes():
        if not _ours(node.domain):
            continue
        op = dialect.OPS.get(node.op_type.split("_")[0])
        if op is None:
            problems.append((str(node.name), f"{node.op_type} is no op of the dialect"))
            continue
        function = model.functions[node.op_identifier()]
        named = [
            *zip(function.inputs, node.inputs, strict=False),
            *zip(function.outputs, node.outputs, strict=False),
        ]
        # By name in the function: a region may have extra operands and only some of the outputs.
        problems += [
            (str(node.name), f"{name} is {value.dtype}, {op.name} needs {op.type_of(name).name}")
            for name, value in ((str(formal.name), actual) for formal, actual in named)
            if value is not None and value.dtype not in (None, op.type_of(name))
        ]
    return problems
