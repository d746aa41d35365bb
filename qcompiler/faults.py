"""What is wrong with an ONNX file that its readers refuse, by the name of what has it.

Their own words are about their code: the file may be truncated, they say, of a value made twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import onnx
import onnx_ir as ir

__all__ = ["fault_of", "map_of", "weight_given_twice"]

_TYPES = frozenset(ir.DataType)

_Owner: TypeAlias = onnx.GraphProto | onnx.FunctionProto


def fault_of(model: onnx.ModelProto) -> str | None:
    """The first fault that is found, None where it is none of those that are looked for."""
    for fault in itertools.chain(_faults(model.graph), _faults_of_functions(model)):
        return fault
    return None


def map_of(model: onnx.ModelProto) -> str | None:
    """An input or output that is a map or holds maps, which onnx_ir cannot read."""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        kind = value.type
        while (which := kind.WhichOneof("value")) in ("sequence_type", "optional_type"):
            kind = getattr(kind, which).elem_type
        if which == "map_type":
            return str(value.name)
    return None


def weight_given_twice(model: onnx.ModelProto) -> str | None:
    """The first name under which a graph has two weights that differ.

    ONNX Runtime takes one of them, and readers of models need not take the same.
    """
    for owner in (model.graph, *model.functions):
        for graph in _graphs(owner):
            known: dict[str, onnx.TensorProto] = {}
            for tensor in _initializers(graph):
                first = known.setdefault(tensor.name, tensor)
                if first is not tensor and first != tensor:  # large ones are slow to compare
                    return str(tensor.name)
    return None


def _faults(owner: _Owner) -> Iterator[str]:
    for graph in _graphs(owner):
        for look in (_made_twice, _unknown_types, _misplaced):
            yield from look(graph)


def _faults_of_functions(model: onnx.ModelProto) -> Iterator[str]:
    seen = set[tuple[str, str, str]]()
    for function in model.functions:
        named = f"function '{function.domain}.{function.name}'"
        key = (function.domain, function.name, function.overload)
        if key in seen:
            yield f"{named} is defined twice"
        seen.add(key)
        yield from (f"{named}: {fault}" for fault in _faults(function))
        imported = {entry.domain or "ai.onnx" for entry in function.opset_import}
        for node in function.node:
            if (domain := node.domain or "ai.onnx") not in imported:
                yield (
                    f"{named}: {_label(node)} is of the domain {domain!r}, of which the function "
                    "imports no version"
                )
        made = {name for node in function.node for name in node.output} | {*function.input}
        for name in function.output:
            if name not in made:
                yield f"{named}: the output {name!r} is no result of a node"


def _graphs(owner: _Owner) -> Iterator[_Owner]:
    yield owner
    for node in owner.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)


def _made_twice(graph: _Owner) -> Iterator[str]:
    makers = dict.fromkeys(_inputs(graph), "an input of that name")
    makers |= {tensor.name: "a weight of that name" for tensor in _initializers(graph)}
    for node in graph.node:
        for name in node.output:
            if name in makers:
                yield f"{name!r} is made twice, by {makers[name]} and by {_label(node)}"
            if name:
                makers[name] = _label(node)


def _unknown_types(graph: _Owner) -> Iterator[str]:
    typed = [(owner, tensor.data_type) for owner, tensor in _tensors(graph)]
    values = list(graph.value_info)
    if isinstance(graph, onnx.GraphProto):
        values += [*graph.input, *graph.output]
    for value in values:
        typed.append((f"value {value.name!r}", value.type.tensor_type.elem_type))
    for owner, number in typed:
        if number not in _TYPES:
            yield f"{owner} is of element type {number}, which ONNX {onnx.__version__} has not"


def _misplaced(graph: _Owner) -> Iterator[str]:
    for owner, tensor in _tensors(graph):
        for entry in tensor.external_data:
            if entry.key in ("offset", "length") and not entry.value.isdecimal():
                yield (
                    f"external data of {owner}: its {entry.key} is {entry.value!r}, which is no "
                    "number of bytes"
                )


def _inputs(graph: _Owner) -> Iterator[str]:
    for value in graph.input:
        yield value if isinstance(value, str) else value.name


def _initializers(graph: _Owner) -> Sequence[onnx.TensorProto]:
    return graph.initializer if isinstance(graph, onnx.GraphProto) else ()


def _tensors(graph: _Owner) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Tensors and what messages call them."""
    for tensor in _initializers(graph):
        yield f"tensor {tensor.name!r}", tensor
    for node in graph.node:
        for attribute in node.attribute:
            single = [attribute.t] if attribute.HasField("t") else []
            for tensor in (*single, *attribute.tensors):
                yield f"the {attribute.name!r} of {_label(node)}", tensor


def _label(node: onnx.NodeProto) -> str:
    return (
        f"{node.op_type} {node.name!r}" if node.name else f"{node.op_type}({', '.join(node.input)})"
    )
