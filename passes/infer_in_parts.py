"""ONNX's shape inference on a large graph, part by part where it would take quadratic time.

For each If, Loop and Scan, ONNX copies the types of all that is known so far, and copying those of
a hundred thousand values a hundred times takes longer than all the rest.  A part knows what it
reads.  Nodes that compute with shapes, which are integers of few axes or a few floats, are inferred
again in each part that reads them: ONNX follows their numbers, and not only their types.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

import onnx

__all__ = ["PART", "infer_shapes"]

PART = 8192
"""Nodes inferred at once; a graph of fewer than two parts is inferred whole."""

_INTEGERS = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
_FEW = 16
"""Floats that may become sizes, as those of a Resize do."""

_GENERATED = "unk__"
"""How ONNX begins the names that it gives to dimensions, which it counts anew in each part."""


def infer_shapes(proto: onnx.ModelProto, *, strict: bool, part: int = PART) -> onnx.ModelProto:
    """The nodes of a model, with the types and shapes of results, those inside bodies among them.

    Args:
        proto: A model whose nodes come after those that they read.  It is not changed.
        strict: Whether what cannot be inferred is an error.
        part: Nodes inferred at once.

    Raises:
        Exception: Of many types: a contradiction, or an op that cannot be inferred, if strict.
    """
    graph = proto.graph
    if len(graph.node) < 2 * part or not any(_graphs(node) for node in graph.node):
        return onnx.shape_inference.infer_shapes(proto, strict_mode=strict, data_prop=True)
    parts = _Parts(proto)
    result = onnx.ModelProto()
    result.CopyFrom(parts.shell)
    for first in range(0, len(graph.node), part):
        names = parts.add(range(first, min(first + part, len(graph.node))), strict)
        result.graph.value_info.extend(parts.known[name] for name in names if name in parts.known)
    result.graph.node.extend(parts.nodes)
    result.graph.output.extend(parts.known.get(out.name, out) for out in graph.output)
    return result


class _Parts:
    """A graph of which one part after the other becomes known.

    Attributes:
        shell: The model without nodes, values and outputs.
        nodes: Those inferred so far, in which bodies have their types.
        known: What is known of each value: at first what the model says.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        graph = proto.graph
        self._all, self.nodes = graph.node, list[onnx.NodeProto]()
        self._producers = {out: i for i, node in enumerate(self._all) for out in node.output if out}
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self.known = {v.name: v for v in [*graph.output, *graph.value_info, *graph.input]}
        self.shell = onnx.ModelProto(ir_version=proto.ir_version)
        self.shell.opset_import.extend(proto.opset_import)
        self.shell.functions.extend(proto.functions)
        self.shell.graph.name = graph.name
        # Bytes behind a name may look like digits of it: a number that is too large does no harm.
        numbers = re.findall(rb"unk__(\d{1,18})", proto.SerializeToString())
        self._fresh = itertools.count(1 + max(map(int, numbers), default=-1))

    def add(self, indices: range, strict: bool) -> Sequence[str]:
        """Infer some nodes; the names of what they make."""
        again, read = self._around(indices)
        proto = onnx.ModelProto()
        proto.CopyFrom(self.shell)
        graph = proto.graph
        graph.node.extend(self._all[i] for i in [*again, *indices])
        graph.input.extend(self.known[name] for name in read if name in self.known)
        graph.initializer.extend(self._constants[n] for n in read if n in self._constants)
        made, remade = (
            [out for i in some for out in self._all[i].output if out] for some in (indices, again)
        )
        graph.value_info.extend(self.known[n] for n in [*remade, *made] if n in self.known)
        symbols = {
            name: name for v in [*graph.input, *graph.value_info] for name in _symbols(v.type)
        }
        graph = onnx.shape_inference.infer_shapes(proto, strict_mode=strict, data_prop=True).graph
        self.nodes += graph.node[len(again) :]
        for value in _values(graph, self.nodes[-len(indices) :]):
            self._rename_symbols(value.type, symbols)
        self.known |= {value.name: value for value in graph.value_info}
        return made

    def _around(self, indices: range) -> tuple[list[int], list[str]]:
        """Nodes before some, which compute shapes for them, and the values that all these read."""
        again, read = set[int](), dict[str, None]()
        left = list(indices)
        while left:
            for name in _reads(self._all[left.pop()]):
                producer = self._producers.get(name)
                if producer is None or (producer < indices.start and not self._may_be_shape(name)):
                    read[name] = None
                elif producer < indices.start and producer not in again:
                    again.add(producer)
                    left.append(producer)
        return sorted(again), list(read)

    def _may_be_shape(self, name: str) -> bool:
        if name not in self.known or not self.known[name].type.HasField("tensor_type"):
            return False
        type = self.known[name].type.tensor_type
        if not type.HasField("shape"):
            return type.elem_type in _INTEGERS
        dims = type.shape.dim
        few = all(0 < dim.dim_value <= _FEW for dim in dims)
        return len(dims) < 2 and (few or type.elem_type in _INTEGERS)

    def _rename_symbols(self, type: onnx.TypeProto, symbols: dict[str, str]) -> None:
        """Let dimensions that ONNX named have names that are nowhere else in the model.

        Args:
            type: Changed in place.
            symbols: Names of this part and what they become; new ones are added.
        """
        for dim in _dimensions(type):
            if dim.dim_param.startswith(_GENERATED):
                if dim.dim_param not in symbols:
                    symbols[dim.dim_param] = f"{_GENERATED}{next(self._fresh)}"
                dim.dim_param = symbols[dim.dim_param]


def _graphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    of_kind = onnx.AttributeProto.GRAPH
    return [attribute.g for attribute in node.attribute if attribute.type == of_kind]


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names of what a node reads, and the bodies inside it, which may be their own."""
    yield from filter(None, node.input)
    for body in _graphs(node):
        yield from (value.name for value in body.output)
        yield from itertools.chain.from_iterable(map(_reads, body.node))


def _values(
    graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]
) -> Iterator[onnx.ValueInfoProto]:
    """What is said of values in a graph, and in the bodies of some of its nodes."""
    yield from graph.value_info
    for body in itertools.chain.from_iterable(map(_graphs, nodes)):
        yield from body.output
        yield from _values(body, body.node)


def _dimensions(type: onnx.TypeProto) -> Sequence[onnx.TensorShapeProto.Dimension]:
    return type.tensor_type.shape.dim if type.HasField("tensor_type") else ()


def _symbols(type: onnx.TypeProto) -> Iterator[str]:
    return (dim.dim_param for dim in _dimensions(type) if dim.dim_param.startswith(_GENERATED))
