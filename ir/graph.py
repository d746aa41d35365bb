"""Questions about a graph that several passes ask, and edits that several make."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.on_disk import on_disk

__all__ = [
    "added_bias",
    "bodies",
    "clamps_after",
    "constant",
    "dequantize_of",
    "drop_if_unread",
    "every_graph",
    "every_node",
    "function_label",
    "label",
    "new_initializer",
    "only_consumer",
    "place_after",
    "rectified",
    "remove_unread",
    "replace_nodes",
    "same_dimension",
    "same_shape",
    "unique_name",
]


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The array of an initializer or Constant, or None for anything known only at run time."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def bodies(node: ir.Node) -> Sequence[ir.Graph]:
    """The graphs inside a node, in the order of its attributes; not those inside these."""
    attributes = node.attributes.data  # most are empty, and an empty UserDict is slow to walk
    if not attributes:
        return ()
    found: list[ir.Graph] = []
    for attribute in attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type is ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type is ir.AttributeType.GRAPHS:
            found.extend(attribute.as_graphs())
    return found


def every_node(graph: ir.Graph | ir.Function) -> Iterator[ir.Node]:
    """The nodes of a graph in order, each before those of the graphs inside it.

    As `all_nodes`, which takes several times as long.
    """
    for node in graph:
        yield node
        if node.attributes.data:
            for inner in bodies(node):
                yield from every_node(inner)


def every_graph(graph: ir.Graph) -> Iterator[ir.Graph]:
    """A graph, and those inside its nodes, each before those inside it.

    As `subgraphs`, which takes several times as long.
    """
    yield graph
    for node in graph:
        for inner in bodies(node):
            yield from every_graph(inner)


def label(node: ir.Node) -> str:
    """How a message calls a node: its name, or where it has none its op and what it makes."""
    made = [value.name for value in node.outputs if value.name]
    return node.name or (f"{node.op_type} of {made[0]!r}" if made else node.op_type)


def function_label(function: ir.Function) -> str:
    """How a message calls a function of a model's own."""
    return f"function '{function.domain}.{function.name}'"


def only_consumer(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value`; None if several do, or if it leaves the graph."""
    readers = {use.node for use in value.uses()}
    if len(readers) != 1 or value.is_graph_output():
        return None
    return readers.pop()


def added_bias(product: ir.Node) -> tuple[ir.Node, int] | None:
    """The Add of a constant per column that alone reads a product, and which input that is."""
    add = only_consumer(product.outputs[0])
    if add is None or add.op_type != "Add":
        return None
    index = 1 if add.inputs[0] is product.outputs[0] else 0
    bias = constant(add.inputs[index])
    return None if bias is None or bias.ndim != 1 else (add, index)


def same_shape(a: ir.Value, b: ir.Value) -> bool:
    """Whether two values provably have equal shapes (equal numbers or equal symbols)."""
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    return all(same_dimension(x, y) for x, y in zip(a.shape, b.shape, strict=True))


def same_dimension(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> bool:
    """Whether two dimensions are provably equal."""
    if isinstance(a, int) or isinstance(b, int):
        return a == b
    # Some exporters write "?" for any dimension they do not know.
    return a.value is not None and a.value == b.value and any(c.isalpha() for c in a.value)


def dequantize_of(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that makes `value`, if one does."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def drop_if_unread(value: ir.Value) -> None:
    """Remove an initializer that nothing reads any more."""
    home = value.graph.initializers if value.graph is not None else {}
    unread = not value.uses() and not value.is_graph_output()
    if unread and value.name is not None and home.get(value.name) is value:
        del home[value.name]


def remove_unread(graph: ir.Graph) -> None:
    """Remove the nodes whose results nothing reads, of the graphs inside too, and such constants.

    As RemoveUnusedNodesPass, which takes several times as long: it also looks at what it keeps.
    """
    for node in reversed(graph):
        if any(value.uses() or value.is_graph_output() for value in node.outputs):
            for inner in bodies(node):
                remove_unread(inner)
        else:
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
            del graph.initializers[name]


def unique_name(graph: ir.Graph, stem: str) -> str:
    """`stem`, or `stem_1`, ... whichever no initializer, input or output of the graph has."""
    taken = {value.name for value in [*graph.inputs, *graph.outputs]}
    # Where the last search for this stem ended: thousands of pairs ask for the same few.
    counts = graph.meta.setdefault("qcompiler.names", collections.Counter())
    name = f"{stem}_{counts[stem]}" if counts[stem] else stem
    while name in graph.initializers or name in taken:
        counts[stem] += 1
        name = f"{stem}_{counts[stem]}"
    return name


def new_initializer(
    graph: ir.Graph, stem: str, array: NDArray[Any], dtype: ir.DataType | None = None
) -> ir.Value:
    """Register a constant under a fresh name and return its value; a large one lies on disk."""
    name = unique_name(graph, stem)
    tensor = ir.Tensor(on_disk(array), dtype=dtype, name=name)
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def replace_nodes(old: Sequence[ir.Node], new: Sequence[ir.Node]) -> None:
    """Put `new` where the last of `old` stands; outputs of the last pass on name, type and users.

    Nodes of `old` before the last must not be read from outside.
    """
    last = old[-1]
    assert last.graph is not None
    ir.convenience.replace_nodes_and_values(
        last.graph, last, old, new, list(last.outputs), list(new[-1].outputs)
    )


def rectified(value: ir.Value) -> ir.Value:
    """The value after the clamps that are all that reads it: an integer form absorbs them."""
    clamps = clamps_after(value)
    return clamps[-1].outputs[0] if clamps else value


def clamps_after(value: ir.Value) -> list[ir.Node]:
    """The Relu and Clips, in order, that read `value` and one another, and that nothing else reads.

    Quantizing their result by its range does what they do, as long as that range may hold 0.
    """
    found: list[ir.Node] = []
    while (node := only_consumer(value)) is not None and _clamps_around_0(node):
        found.append(node)
        value = node.outputs[0]
    return found


def _clamps_around_0(node: ir.Node) -> bool:
    if node.op_type == "Relu":
        return node.domain == ""
    if node.op_type != "Clip" or node.domain:
        return False
    low, high = (constant(v) for v in [*node.inputs[1:], None, None][:2])
    known = all(value is None or constant(value) is not None for value in node.inputs[1:])
    return known and (low is None or bool(low <= 0)) and (high is None or bool(high >= 0))


def place_after(value: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """Insert nodes where `value` is defined, so that every reader of it, in branches too, is below.

    Args:
        value: Made by a node, or an input or initializer of a graph.
        nodes: In topological order.
    """
    producer = value.producer()
    if producer is not None:
        assert producer.graph is not None
        producer.graph.insert_after(producer, nodes)
        return
    assert value.graph is not None
    if len(value.graph):
        value.graph.insert_before(value.graph[0], nodes)
    else:
        value.graph.extend(nodes)
