"""What a model must be before anything is done to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir

from qcompiler.ir import dialect
from qcompiler.ir.errors import ModelError
from qcompiler.ir.graph import every_graph, every_node, label

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
        ModelError: Its opset is unknown, it has ops of ours, or NaN among its weights.
    """
    newest = onnx.defs.onnx_opset_version()
    opset = model.graph.opset_imports.get("", newest)
    if opset > newest:
        raise ModelError(
            f"the model is of opset {opset}, the installed onnx knows {newest}: export it again "
            f"with opset {newest} or older, or pip install -U onnx"
        )
    check_not_compiled(model)
    for value in _initializers(model):
        tensor = value.const_value
        # A single NaN may be meant, as what Where puts in; an array that holds one is damaged.
        if tensor is None or tensor.size < 2 or not tensor.dtype.is_floating_point():
            continue
        count = _count_of_nan(tensor)
        if count:
            readers = [use.node.name or use.node.op_type for use in value.uses()]
            read = f", which {readers[0]!r} reads," if readers else ""
            raise ModelError(
                f"the weight {value.name!r}{read} holds {count} NaN: the model is damaged; "
                "export it again"
            )


def check_whole(model: ir.Model, name: str) -> None:
    """Refuse a model in which something is missing, which no reader of models asks for.

    Args:
        model: The model.
        name: What messages call it.

    Raises:
        ModelError: Its opset is too old, it has no outputs, or a value or a domain is used that it
            does not define.
    """
    opset = model.graph.opset_imports.get("", _OLDEST_OPSET)
    if opset < _OLDEST_OPSET:
        raise ModelError(
            f"{name} is of opset {opset}, and ONNX Runtime has no kernels of ops below "
            f"{_OLDEST_OPSET}, so that nothing could be compared with it: export it again, or "
            f"convert it with onnx.version_converter.convert_version(model, {_OLDEST_OPSET})"
        )
    if not model.graph.outputs:
        raise ModelError(f"{name} has no outputs, so that it computes nothing; export it with some")
    for node in every_node(model.graph):
        for value in node.inputs:
            if value is not None and _is_undefined(value):
                raise ModelError(
                    f"{name}: node {label(node)!r} reads {value.name!r}, which is no input, no "
                    "weight and no result of another node; export the model again"
                )
        if node.domain not in model.graph.opset_imports:
            domain = node.domain or "ai.onnx"
            raise ModelError(
                f"{name}: node {label(node)!r} is of the domain {domain!r}, of which the model "
                "imports no version; export it again"
            )
    for value in model.graph.outputs:
        if _is_undefined(value):
            raise ModelError(
                f"{name}: the output {value.name!r} is no result of a node; export the model again"
            )


def _is_undefined(value: ir.Value) -> bool:
    return not (value.producer() or value.is_graph_input() or value.is_initializer())


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


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in every_graph(model.graph):
        yield from graph.initializers.values()


def _count_of_nan(tensor: ir.TensorProtocol) -> int:
    array = tensor.numpy()
    # The minimum carries a NaN on, and needs no array of the size of this one.
    count = int(np.isnan(array).sum()) if np.isnan(array.min()) else 0
    del array
    if isinstance(tensor, ir.ExternalTensor):
        with contextlib.suppress(BufferError):  # somebody else holds the array
            tensor.release()  # else the whole file stays mapped
    return count


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
