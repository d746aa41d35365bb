"""Run a float model in ONNX Runtime and look at tensors inside it."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import onnx_ir as ir

from qcompiler.bundle import sha256_of
from qcompiler.cores import available_cores
from qcompiler.exact_copy import make_exact
from qcompiler.installed import import_onnxruntime
from qcompiler.ir.errors import CalibrationError, said_by_ort
from qcompiler.ir.graph import every_node
from qcompiler.model_part import save_part
from qcompiler.runtime import open_session
from qcompiler.samples import Sample, check_sample, disagreement
from qcompiler.session_options import QUIET
from qcompiler.targets.cache import content_key

__all__ = ["Probe"]

_FILE = "probed.onnx"


class Probe:
    """A copy of a model, on disk, whose outputs are the tensors to look at.

    with Probe(model, ["x", "y"]) as probe:
        for label, tensors in probe.run(lambda inputs: samples): ...

    Args:
        model: A float model; it is not changed.
        names: Tensors of the graph itself, inputs among them; not of its branches.
    """

    def __init__(self, model: ir.Model, names: Sequence[str]) -> None:
        self.names = tuple(names)
        given = {value.name for value in model.graph.inputs}
        self._computed = [name for name in names if name not in given]
        self._model = model
        self._disabled: tuple[str, ...] = ()
        self._folder = tempfile.TemporaryDirectory(prefix="qcompiler-")

    def __enter__(self) -> Probe:
        model = self._model.clone() if _has_int8(self._model) else self._model
        values = {value.name: value for node in model.graph for value in node.outputs}
        tensors = [values[name] for name in self._computed] or list(model.graph.outputs)
        self._disabled = make_exact(model) if model is not self._model else ()
        save_part(model, tensors, self._path)
        return self

    def __exit__(
        self,
        type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._folder.cleanup()

    @property
    def digest(self) -> str:
        """Hash of the model as far as the tensors depend on it."""
        parts = sorted(self._path.parent.iterdir())
        return content_key(*self.names, *(sha256_of(part) for part in parts))

    def run(
        self,
        draw: Callable[[Sequence[Any]], Iterable[tuple[str, Sample]]],
        *,
        optimized: bool = True,
        at_once: int = 1,
    ) -> Iterator[tuple[str, Sample]]:
        """What messages call each sample, and the tensors on it, in the order of the samples.

        Args:
            draw: Given the session's inputs, gives samples and what to call them.
            optimized: Let ORT optimize the graph first: a single run is over before that is.
            at_once: How many samples run side by side, and are in memory then: two samples on one
                core each take less time than one after the other on both.

        Raises:
            CalibrationError: A sample that does not fit, or that the model fails on.
            ModelError: ONNX Runtime cannot load the model.
        """
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = QUIET  # it warns of weights that only other outputs needed
        if not optimized:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            # Threads that wait for more to do would keep the cores busy long after it is over.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        at_once = min(at_once, available_cores())
        if at_once > 1:  # those who call it compute, too, and share the others that it has
            options.intra_op_num_threads = available_cores() - at_once + 1
        session = open_session(self._path, options=options, disabled=self._disabled)
        inputs = session.get_inputs()

        def look(labelled: tuple[str, Sample]) -> tuple[str, Sample]:
            label, sample = labelled
            feeds = check_sample(label, sample, inputs)
            tensors = feeds | self._compute(session, label, feeds)
            return label, {name: tensors[name] for name in self.names}

        yield from _in_order(look, draw(inputs), at_once)

    def _compute(self, session: Any, label: str, feeds: Sample) -> Sample:
        if not self._computed:
            return {}
        try:
            return dict(zip(self._computed, session.run(self._computed, feeds), strict=True))
        except Exception as error:
            # ORT raises bare RuntimeErrors as well as its own types.
            sizes = disagreement(feeds, session.get_inputs())
            raise CalibrationError(
                f"the model fails on {label}: {said_by_ort(error)}{sizes}"
            ) from error

    @property
    def _path(self) -> Path:
        return Path(self._folder.name) / _FILE


def _in_order(
    look: Callable[[tuple[str, Sample]], tuple[str, Sample]],
    samples: Iterable[tuple[str, Sample]],
    at_once: int,
) -> Iterator[tuple[str, Sample]]:
    """What `look` makes of each sample, so many at a time; one more is read meanwhile."""
    if at_once == 1:
        yield from map(look, samples)
        return
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        left = iter(samples)
        running = collections.deque(
            pool.submit(look, sample) for sample in itertools.islice(left, at_once + 1)
        )
        while running:
            done = running.popleft().result()
            running.extend(pool.submit(look, sample) for sample in itertools.islice(left, 1))
            yield done


def _has_int8(model: ir.Model) -> bool:
    """Whether `make_exact` may find something to change."""
    operands = (value for node in every_node(model.graph) for value in node.inputs)
    return any(value is not None and value.dtype is ir.DataType.INT8 for value in operands)
