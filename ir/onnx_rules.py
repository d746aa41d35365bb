"""What ai.onnx asks of its own ops: that they exist, and take what they are given.

No pass needs a whole shape inference after it to be told that it wrote an op that the opset does
not have, left an operand or an attribute out, gave one that the op does not know, or mixed two
types where the schema has one.  What is not known of a value is not held against it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import onnx
import onnx_ir as ir

from qcompiler.ir import dialect
from qcompiler.ir.errors import did_you_mean
from qcompiler.ir.graph import every_node, label

__all__ = ["onnx_problems", "problems_in"]

_VARIADIC = onnx.defs.OpSchema.FormalParameterOption.Variadic


@dataclasses.dataclass(frozen=True)
class _Signature:
    """The bounds of an op's operands, the type variable of each, and the attributes.

    Attributes:
        fewest: Operands.
        most: Operands; of a variadic op very many.
        inputs: The type variable of each formal input, the last for all that follow if variadic;
            empty where any type goes.
        outputs: The same of the outputs.
        variadic: Whether the last input, and the last output, stand for several.
        types: The tensor types that each variable stands for.
        attributes: The type of each attribute.
        required: Attributes that have no default.
    """

    fewest: int
    most: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    variadic: tuple[bool, bool]
    types: dict[str, frozenset[str]]
    attributes: dict[str, ir.AttributeType]
    required: frozenset[str]


def onnx_problems(model: ir.Model) -> Iterator[tuple[str, str, str]]:
    """Rule, node and problem of every node of ai.onnx that breaks a rule; linear in the nodes.

    Those of the model's own functions are looked at too, but not the bodies of our ops.  The
    problem names no value: what a source had wrong already reads the same after every pass.
    """
    yield from problems_in(model.graph)
    for function in model.functions.values():
        if not dialect.is_ours(function.domain):
            yield from problems_in(function)


def problems_in(owner: ir.Graph | ir.Function) -> Iterator[tuple[str, str, str]]:
    """The same of a graph, or of one function, alone."""
    opset = owner.opset_imports.get("", 1)
    for node in every_node(owner):
        if node.domain == "":
            given = tuple((a.name, a.type) for a in node.attributes.values())
            types = _types(node.inputs), _types(node.outputs)
            found = _problems(node.op_type, opset, *types, given)
            for rule, problem in found:
                yield rule, label(node), problem


_Types = tuple[ir.DataType | None, ...]
_Attributes = tuple[tuple[str, ir.AttributeType], ...]


def _types(values: Sequence[ir.Value | None]) -> _Types:
    """Of each value that is known to be a tensor, the type."""
    kinds = (None if value is None else value.type for value in values)
    return tuple(kind.dtype if type(kind) is ir.TensorType else None for kind in kinds)


@functools.lru_cache(maxsize=4096)  # models have few kinds of nodes: ten times as fast as without
def _problems(
    op: str, opset: int, inputs: _Types, outputs: _Types, attributes: _Attributes
) -> tuple[tuple[str, str], ...]:
    signature = _signature(op, opset)
    if signature is None:
        return (("onnx-op", f"ai.onnx {opset} has no {op}{_instead(op, opset)}"),)
    if not signature.fewest <= len(inputs) <= signature.most:
        return (("onnx-operands", f"{op} with {len(inputs)} operands"),)
    return (*_misfits(op, attributes, signature), *_mixed(op, inputs, outputs, signature))


def _misfits(op: str, attributes: _Attributes, signature: _Signature) -> Iterator[tuple[str, str]]:
    """The rule, and each attribute that is missing, unknown or of another type."""
    for name in sorted(signature.required - {name for name, _ in attributes}):
        yield "onnx-attributes", f"{op} without its attribute {name!r}"
    for name, kind in attributes:
        wanted = signature.attributes.get(name)
        if wanted is None:
            hint = did_you_mean(name, signature.attributes)
            yield "onnx-attributes", f"{op} has no attribute {name!r}{hint}"
        elif kind != wanted:
            yield "onnx-attributes", f"{op} whose {name!r} is {kind.name}, not {wanted.name}"


def _mixed(
    op: str, inputs: _Types, outputs: _Types, signature: _Signature
) -> Iterator[tuple[str, str]]:
    """The rule, and each type variable that would stand for two types or a wrong one."""
    found: dict[str, ir.DataType] = {}
    for formals, dtypes, variadic in (
        (signature.inputs, inputs, signature.variadic[0]),
        (signature.outputs, outputs, signature.variadic[1]),
    ):
        for name, dtype in zip(_repeated(formals, len(dtypes), variadic), dtypes, strict=False):
            if not name or dtype is None:
                continue
            if found.setdefault(name, dtype) != dtype:
                yield "onnx-types", f"{op} of {found[name]} and {dtype}, whose {name} is one type"
            elif f"tensor({dtype.name.lower()})" not in signature.types[name]:
                yield "onnx-types", f"{op} of {dtype}, which its {name} may not be"


def _repeated(formals: Sequence[str], count: int, variadic: bool) -> Sequence[str]:
    return [*formals, *[formals[-1]] * (count - len(formals))] if variadic and formals else formals


@functools.cache
def _op_names() -> frozenset[str]:
    return frozenset(s.name for s in onnx.defs.get_all_schemas() if s.domain == "")


def _instead(op: str, opset: int) -> str:
    """What to do where an opset lacks an op: take a newer one, or another name."""
    if op not in _op_names():
        return did_you_mean(op, _op_names())
    known = onnx.defs.get_all_schemas_with_history()
    first = min(s.since_version for s in known if (s.domain, s.name) == ("", op))
    return f", which came with {first}" if first > opset else ""


@functools.cache
def _signature(op: str, opset: int) -> _Signature | None:
    if not onnx.defs.has(op, opset, ""):
        return None
    schema = onnx.defs.get_schema(op, opset, "")
    if schema.deprecated:
        return None
    types = {
        constraint.type_param_str: frozenset(constraint.allowed_type_strs)
        for constraint in schema.type_constraints
        if all(kind.startswith("tensor(") for kind in constraint.allowed_type_strs)
    }
    formals = (schema.inputs, schema.outputs)
    inputs, outputs = (tuple(_variable(f, types) for f in side) for side in formals)
    variadic = [bool(side) and side[-1].option == _VARIADIC for side in formals]
    attributes = {
        name: ir.AttributeType(attribute.type.value)
        for name, attribute in schema.attributes.items()
    }
    required = frozenset(name for name, a in schema.attributes.items() if a.required)
    return _Signature(
        schema.min_input, schema.max_input, inputs, outputs, (variadic[0], variadic[1]), types,
        attributes, required,
    )  # fmt: skip


def _variable(formal: Any, types: dict[str, frozenset[str]]) -> str:
    """The variable, empty where a formal has none, or takes values of several types."""
    mixed = formal.option == _VARIADIC and not formal.is_homogeneous
    return formal.type_str if formal.type_str in types and not mixed else ""
