"""The stages of a compilation and what each allows; checked after every pass.

float      canonical ONNX, nothing of ours
qdq        decisions are explicit Q/DQ pairs; still nothing of ours
quantized  pairs folded into ops of the `qcompiler` domain
kernel     regions outlined into a domain of their own
"""

from __future__ import annotations

import enum

import onnx_ir as ir

from qcompiler.ir import dialect
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
    for rule in (_known_ops, _typed_outputs, _function_rules, _operand_types):
        for node_name, problem in rule(model, stage):
            raise VerifyError(f"after {after}: {node_name}: {problem} (stage {stage.name.lower()})")


_Problems = list[tuple[str, str]]


def _ours(domain: str) -> bool:
    return domain == dialect.DOMAIN or domain.startswith(f"{dialect.DOMAIN}.")


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
        op = dialect.OPS[node.op_type.split("_")[0]]
        named = [
            *zip(op.inputs, node.inputs, strict=False),
            *zip(op.outputs, node.outputs, strict=False),
        ]
        problems += [
            (str(node.name), f"{name} is {value.dtype}, {op.name} needs {op.type_of(name).name}")
            for name, value in named
            if value is not None and value.dtype not in (None, op.type_of(name))
        ]
    return problems
