"""What a model must be before anything is done to it."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

from qcompiler.ir import dialect
from qcompiler.ir.errors import ModelError
from qcompiler.ir.graph import every_graph, every_node, function_label, label
from qcompiler.not_finite import refuse_nan

__all__ = [
    "check_not_compiled",
    "check_source",
    "check_whole",
    "foreign_domains",
    "inputs_with_defaults",
]

_OLDEST_OPSET = 7

_KNOWN_TO_ORT = frozenset({
    "", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training", "com.microsoft",
    "com.microsoft.experimental", "com.microsoft.nchwc", "com.ms.internal.nhwc",
})  # fmt: skip
"""Domains whose ops any ONNX Runtime has."""


def check_source(model: ir.Model) -> None:
    """Refuse a model that was compiled before, or that is broken.

    Raises:
        ModelError: Its opset is unknown, it has ops of ours, or NaN among its constants.
    """
    newest = onnx.defs.onnx_opset_version()
    opset = model.graph.opset_imports.get("", newest)
    if opset > newest:
        raise ModelError(
            f"the model is of opset {opset}, the installed onnx knows {newest}: export it again "
            f"with opset {newest} or older, or pip install -U onnx"
        )
    check_not_compiled(model)
    refuse_nan(model)


def check_whole(model: ir.Model, name: str) -> None:
    """Refuse a model in which something is missing, which no reader of models asks for.

    Args:
        model: The model.
        name: What messages call it.

    Raises:
        ModelError: Its opset is too old, it has no outputs, or a value, a domain or an element type
            is missing, in it or in one of its functions.
    """
    opset = model.graph.opset_imports.get("", _OLDEST_OPSET)
    old = next((node for node in every_node(model.graph) if _is_too_old(node, opset)), None)
    if opset < 1 or old is not None:
        op = "ops" if old is None else f"ops such as {old.op_type}"
        raise ModelError(
            f"{name} is of opset {opset}, and ONNX Runtime has no kernels of {op} below "
            f"{_OLDEST_OPSET}, so that nothing could be compared with it: export it again, or "
            f"convert it with onnx.version_converter.convert_version(model, {_OLDEST_OPSET})"
        )
    if not model.graph.outputs:
        raise ModelError(f"{name} has no outputs, so that it computes nothing; export it with some")
    for problem in _missing(model, model.graph, "the model"):
        raise ModelError(f"{name}: {problem}; export the model again")
    for function in model.functions.values():
        owner = function_label(function)
        for problem in _missing(model, function, owner):
            raise ModelError(f"{name}: {owner}: {problem}; export the model again")


def _missing(model: ir.Model, owner: ir.Graph | ir.Function, called: str) -> Iterator[str]:
    """What is missing in a graph or a function, in the order of its nodes."""
    for node in every_node(owner):
        for value in node.inputs:
            if value is not None and _is_undefined(value):
                yield (
                    f"node {label(node)!r} reads {value.name!r}, which is no input, no weight and "
                    "no result of another node"
                )
        if node.domain not in owner.opset_imports:
            domain = node.domain or "ai.onnx"
            yield (
                f"node {label(node)!r} is of the domain {domain!r}, of which {called} imports no "
                "version"
            )
        function = model.functions.get(node.op_identifier())
        if function is not None and len(node.inputs) > len(function.inputs):
            yield (
                f"node {label(node)!r} gives {len(node.inputs)} operands to "
                f"{function_label(function)}, which takes {len(function.inputs)}"
            )
        for attribute in node.attributes.values() if node.op_type == "Constant" else ():
            if attribute.type is ir.AttributeType.TENSOR and not attribute.is_ref():
                for problem in _untyped(attribute.value):
                    yield f"the constant of node {label(node)!r} {problem}"
    for value in owner.outputs:
        if _is_undefined(value):
            yield f"the output {value.name!r} is no result of a node"
    for graph in every_graph(owner) if isinstance(owner, ir.Graph) else ():
        for value in graph.initializers.values():
            for problem in _untyped(value.const_value):
                yield f"the weight {value.name!r} {problem}"


def _is_too_old(node: ir.Node, opset: int) -> bool:
    """Whether an op changed before the first opset that ONNX Runtime has kernels of."""
    if opset >= _OLDEST_OPSET or node.domain not in ("", "ai.onnx"):
        return False
    try:
        versions = [onnx.defs.get_schema(node.op_type, n) for n in (opset, _OLDEST_OPSET)]
    except onnx.defs.SchemaError:
        return True
    return len({schema.since_version for schema in versions}) > 1


def _is_undefined(value: ir.Value) -> bool:
    return not (value.producer() or value.is_graph_input() or value.is_initializer())


def _untyped(tensor: ir.TensorProtocol | None) -> Iterator[str]:
    try:
        if tensor is not None and tensor.dtype is ir.DataType.UNDEFINED:
            yield "has no element type (data_type 0)"
    except ValueError as error:
        yield f"is of an unknown element type ({error})"


def check_not_compiled(model: ir.Model) -> None:
    """Refuse a model that has ops of ours.

    Raises:
        ModelError: Names one.
    """
    for node in every_node(model.graph):
        if dialect.is_ours(node.domain):
            raise ModelError(
                f"the model was compiled before: node {node.name!r} is {node.domain}:"
                f"{node.op_type}; compile the model that it was made from"
            )


def inputs_with_defaults(model: ir.Model) -> list[str]:
    """Inputs that may be fed or not; before IR version 4 every initializer looked like one."""
    if (model.ir_version or 0) < 4:
        return []
    return [v.name for v in model.graph.inputs if v.name and v.name in model.graph.initializers]


def foreign_domains(model: ir.Model) -> list[str]:
    """Domains of ops that ONNX Runtime knows only with a library of somebody else's."""
    defined = {(function.domain, function.name) for function in model.functions.values()}
    used = {
        node.domain
        for node in every_node(model.graph)
        if (node.domain, node.op_type) not in defined
    }
    ours = {d for d in used if d == dialect.DOMAIN or d.startswith(f"{dialect.DOMAIN}.")}
    return sorted(used - ours - _KNOWN_TO_ORT)
