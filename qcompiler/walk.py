"""Run a float model on samples from one tensor to the next, each node once per sample.

What later nodes read of a sample lies on disk between two stops, so that memory holds the weights
of one stretch and one sample, for a model and a number of samples of any size.  Between two stops
the model may change: the next stretch is run as it is then.

    with walker(samples)(model, [x, y]) as walk:
        for label, rows in walk.rows(x): ...
        # change the products that read x
        for label, rows in walk.rows(y): ...       # with the change
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.held_folder import HeldFolder
from qcompiler.installed import import_onnxruntime
from qcompiler.ir.analysis import End, GraphView
from qcompiler.ir.errors import CalibrationError, said_by_ort
from qcompiler.ir.graph import every_graph, every_node, new_initializer
from qcompiler.ir.on_disk import let_go
from qcompiler.model_file import saving
from qcompiler.passes.second_moments import Walker
from qcompiler.passes.widen_constants import dequantized_constant
from qcompiler.runtime import open_session
from qcompiler.samples import Sample, Samples, check_sample
from qcompiler.targets.cache import content_key
from qcompiler.timing.observed_shapes import model_inputs

__all__ = ["SampleWalk", "walker"]

_FILE = "stretch.onnx"
_HINT = "; TMPDIR says where what is read later of each sample lies"
_RANDOM = frozenset({"RandomNormal", "RandomUniform", "Multinomial", "Bernoulli"})


def walker(samples: Samples) -> Walker:
    """Starts walks over these samples."""

    def start(model: ir.Model, stops: list[ir.Value]) -> SampleWalk:
        return SampleWalk(model, stops, samples)

    return start


class SampleWalk:
    """A walk over samples, see `qcompiler.passes.second_moments.Walk`."""

    def __init__(self, model: ir.Model, stops: Sequence[ir.Value], samples: Samples) -> None:
        """Plan it; nothing is run yet.

        Args:
            model: A float model.
            stops: Values of the graph itself, in the order of their first readers.
            samples: What to run it on.
        """
        self._model, self._stops, self._samples = model, list(stops), samples
        self._view = GraphView(model.graph)
        self._live = _live_at(self._view, self._stops)
        self._at = -1
        self._inputs = model_inputs(model)
        self.digest = content_key(
            _digest_of(model), samples.digest, import_onnxruntime().__version__
        )
        self._folder = HeldFolder("qcompiler-walk-")

    def __enter__(self) -> SampleWalk:
        return self

    def __exit__(
        self,
        type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._folder.remove()

    def rows(self, value: ir.Value) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """The rows that `value` has on each sample, see `Walk.rows`.

        Raises:
            CalibrationError: A sample that does not fit, or that the model fails on, or all of
                them are empty.
            ModelError: ONNX Runtime cannot load a part of the model.
        """
        goal = self._stops.index(value)
        while self._at + 1 < goal:
            for _ in self._stretch():
                pass
        for label, tensors in self._stretch():
            array = tensors[value.name or ""]
            yield label, array.reshape(-1, array.shape[-1])

    def _stretch(self) -> Iterator[tuple[str, Sample]]:
        """Run from one stop to the next, and keep what is read behind it."""
        self._at += 1
        before = self._live[self._at - 1] if self._at else []
        wanted = self._live[self._at]
        made = [value for value in wanted if value not in before]
        compute = self._open(before, made) if made else None
        names, empty = [value.name or "" for value in made], True
        for number, (label, sample) in enumerate(self._samples):
            given = check_sample(label, sample, self._inputs)
            empty = empty and not any(array.size for array in given.values())
            file = self._folder.path / f"{number}.npz"
            kept = _load(file) if before else {}
            if compute is not None:
                kept |= dict(zip(names, compute(label, given | kept), strict=True))
            kept = {name: kept[name] for value in wanted if (name := value.name or "") in kept}
            _save(file, kept)
            yield label, given | kept
        if empty:
            raise CalibrationError(
                f"the samples are empty: no input ever held a value in {self._samples.name}; give "
                "some that have at least one row"
            )

    def _open(
        self, before: Sequence[ir.Value], made: Sequence[ir.Value]
    ) -> Callable[[str, Sample], list[NDArray[Any]]]:
        """A function from the tensors at one stop to those made on the way to the next."""
        part = self._extract(before, made)
        path = self._folder.path / _FILE
        with saving(path, _HINT):
            ir.save(part, path, external_data=f"{_FILE}.data")
        for value in [*part.graph.initializers.values(), *self._model.graph.initializers.values()]:
            let_go(value)
        for value in part.graph.initializers.values():
            value.const_value = None  # a graph, being full of cycles, is collected late
        session = open_session(path)
        read = [expected.name for expected in session.get_inputs()]
        names = [value.name for value in made]

        def compute(label: str, tensors: Sample) -> list[NDArray[Any]]:
            try:
                feeds = {name: tensors[name] for name in read}
                return session.run(names, feeds)  # type: ignore[no-any-return]
            except Exception as error:
                # ORT raises bare RuntimeErrors as well as its own types.
                said = said_by_ort(error)
                raise CalibrationError(f"the model fails on {label}: {said}") from error

        return compute

    def _extract(self, before: Sequence[ir.Value], made: Sequence[ir.Value]) -> ir.Model:
        """The part of the model, as it is now, that computes `made`."""
        source = self._model.graph
        ends = [*source.inputs, *(value for value in before if not value.is_graph_input())]
        graph = ir.convenience.extract(source, ends, list(made))
        graph.inputs[:] = [value for value in graph.inputs if value.uses()]
        for node in list(graph):
            if node.op_type != "DequantizeLinear":
                continue
            # ORT would make MatMulNBits of it, which rounds activations to 8 bits.
            floats = dequantized_constant(node.outputs[0])
            if floats is not None:
                widened = new_initializer(graph, f"{node.outputs[0].name}_float", floats)
                ir.convenience.replace_all_uses_with(node.outputs[0], widened)
                graph.remove(node, safe=True)
        used = [value for value in graph.initializers.values() if not value.uses()]
        for value in used:
            if value not in graph.outputs:
                del graph.initializers[value.name or ""]
        functions = list(self._model.functions.values())
        return ir.Model(graph, ir_version=self._model.ir_version, functions=functions)


def _live_at(view: GraphView, stops: Sequence[ir.Value]) -> list[list[ir.Value]]:
    """What is read at and behind each stop of what was made before it, the stop among it."""
    order: dict[Any, int] = {node: index for index, node in enumerate(view.nodes)}
    fixed = _constant_nodes(view)
    last: dict[ir.Value, int] = {}
    for node in view.nodes:
        for value in node.outputs:
            if node in fixed and value not in stops:
                continue
            readers = [order[place] for place in view.readers(value) if place is not End.SINK]
            last[value] = max(readers, default=-1)
    first = [min(order[place] for place in view.readers(stop) if place is not End.SINK)
             for stop in stops]  # fmt: skip
    # Stops come in the order of their first products: what reads one earlier than those of the stop
    # before it does not depend on that.
    cuts = itertools.accumulate(first, max)
    return [
        [value for value, reader in last.items() if order[value.producer()] < cut <= reader]
        for cut in cuts
    ]


def _constant_nodes(view: GraphView) -> set[ir.Node]:
    """Nodes that depend on no input: cheaper to run again than to keep per sample."""
    fixed: set[ir.Node] = set()
    for node in view.nodes:
        makers = view.makers(node)
        if node.op_type not in _RANDOM and all(place in fixed for place in makers):
            fixed.add(node)
    return fixed


def _digest_of(model: ir.Model) -> str:
    """Hash of what the model computes: decisions and notes, which tell of times, do not count."""
    digest = hashlib.sha256()
    for node in every_node(model.graph):
        names = [None if value is None else value.name for value in [*node.inputs, *node.outputs]]
        digest.update(repr((node.domain, node.op_type, len(node.inputs), names)).encode())
        for name, attribute in sorted(node.attributes.items()):
            if attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
                proto = ir.serde.serialize_attribute(attribute)
                digest.update(name.encode() + proto.SerializeToString(deterministic=True))
    for graph in every_graph(model.graph):
        for name, value in sorted(graph.initializers.items()):
            tensor = value.const_value
            if tensor is not None:
                digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
                digest.update(tensor.tobytes())
                let_go(value)
    return digest.hexdigest()


def _save(file: Path, tensors: Sample) -> None:
    # By number: names of tensors may hold what names of files may not.
    with saving(file, _HINT):
        np.savez(file, *tensors.values(), names=np.asarray(list(tensors), dtype=np.str_))


def _load(file: Path) -> Sample:
    with np.load(file, allow_pickle=False) as arrays:
        return {str(name): arrays[f"arr_{i}"] for i, name in enumerate(arrays["names"])}
