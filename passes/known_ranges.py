"""Remember what calibration saw of a model's tensors, for as long as the model is the same."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from qcompiler.ir.graph import every_node
from qcompiler.ir.types import TensorStats
from qcompiler.passes.insert_qdq import Observer

__all__ = ["KnownRanges", "content_of"]

_PLAIN = (int, float, str, bytes, tuple, list)


class KnownRanges:
    """An observer that does not run a model again for tensors that it has seen.

    Passes that look at models quantized in one way or another ask for the ranges of the same float
    tensors each time; copies of a model are the same model.

    Attributes:
        observe: Runs the model.
    """

    def __init__(self, observe: Observer) -> None:
        self.observe = observe
        self._model: object = None
        self._known: dict[tuple[str, str | None], TensorStats] = {}

    def __call__(
        self, model: ir.Model, names: Mapping[str, str | None]
    ) -> Mapping[str, TensorStats]:
        """The ranges of tensors, see `InsertQDQ`."""
        content = content_of(model.graph)
        if content != self._model:
            self._model, self._known = content, {}
        missing = dict(item for item in names.items() if item not in self._known)
        if missing:
            seen = self.observe(model, missing)
            self._known |= {(name, missing[name]): stats for name, stats in seen.items()}
        return {name: self._known[name, method] for name, method in names.items()}

    def carry(self, before: ir.Model, after: ir.Model) -> None:
        """Let what is known of one model hold for another, too.

        Args:
            before: As it was when it was last asked about; nothing happens otherwise.
            after: The same in other words: what has the same name in both has the same numbers.
        """
        if self.are_of(before):
            self.hold_for(after)

    def are_of(self, model: ir.Model) -> bool:
        """Whether it is this model that they were last asked about."""
        return self._model is not None and content_of(model.graph) == self._model

    def hold_for(self, model: ir.Model) -> None:
        """Let what is known hold for a model, see `carry`."""
        self._model = content_of(model.graph)


def content_of(graph: ir.Graph) -> list[object]:
    """What the tensors of a graph depend on; constants by identity, as copies share them.

    A text for each node, which the garbage collector need not look through.
    """
    nodes: list[object] = []
    for node in every_node(graph):
        attributes = node.attributes.data.items()
        plain = [(key, a.value) for key, a in attributes if isinstance(a.value, _PLAIN)]
        read = [value and value.name for value in node.inputs]
        made = [value.name for value in node.outputs]
        nodes.append(repr((node.domain, node.op_type, read, made, plain)))
    constants = [(name, _Same(value.const_value)) for name, value in graph.initializers.items()]
    return [*nodes, *constants]


class _Same:
    """Equal to nothing but what holds the same object, which it keeps from being replaced."""

    def __init__(self, held: object) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.held is self.held

    __hash__ = None  # type: ignore[assignment]
