"""The shapes that a model's tensors have on given inputs: seen by running it once."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompiler.installed import import_onnxruntime
from qcompiler.ir.errors import ModelError, said_by_ort
from qcompiler.random_inputs import Feed
from qcompiler.runtime import open_session
from qcompiler.session_options import QUIET

__all__ = ["ModelInput", "model_inputs", "observed_shapes"]


@dataclasses.dataclass(frozen=True)
class ModelInput:
    """An input as `session.get_inputs()` describes it."""

    name: str
    shape: list[int | str | None]
    type: str


def model_inputs(model: ir.Model) -> list[ModelInput]:
    """The inputs that must be fed."""
    given = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    return [
        ModelInput(
            value.name or "",
            [_dimension(dim) for dim in value.shape or ()],
            f"tensor({'?' if value.dtype is None else value.dtype.name.lower()})",
        )
        for value in given
    ]


def _dimension(dim: int | ir.SymbolicDim) -> int | str | None:
    if isinstance(dim, int):
        # Some exporters write -1 for a dimension they do not know.
        return dim if dim >= 0 else None
    return dim.value


def observed_shapes(
    model: ir.Model, names: Sequence[str], feed: Feed
) -> dict[str, tuple[int, ...]]:
    """The shapes of the named tensors on `feed`.

    Args:
        model: A float model; it is not changed.
        names: Tensors of the graph itself, not of its branches.
        feed: An array per input.

    Raises:
        ModelError: The model fails on them.
    """
    known = {name: feed[name].shape for name in names if name in feed}
    wanted = [name for name in names if name not in feed]
    if not wanted:
        return known
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
        path = Path(folder) / "shapes.onnx"
        ir.save(_reporting(model, wanted), path, external_data="shapes.onnx.data")
        options = import_onnxruntime().SessionOptions()
        # It warns of every initializer that only outputs of before needed.
        options.log_severity_level = QUIET
        session = open_session(path, options=options)
        try:
            found: Sequence[Any] = session.run(None, feed)
        except Exception as error:
            # ORT raises bare RuntimeErrors as well as its own types.
            said = said_by_ort(error)
            raise ModelError(f"the model fails on inputs of these shapes: {said}") from error
    return known | {n: tuple(map(int, s)) for n, s in zip(wanted, found, strict=True)}


def _reporting(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy whose outputs are the shapes of the named tensors."""
    graph = (copy := model.clone()).graph
    values = {value.name: value for node in graph for value in node.outputs}
    graph.outputs.clear()
    for index, name in enumerate(names):
        node = ir.node("Shape", [values[name]], name=f"qcompiler_shape_{index}")
        node.outputs[0].name = f"qcompiler_shape_{index}"
        node.outputs[0].dtype = ir.DataType.INT64
        graph.append(node)
        graph.outputs.append(node.outputs[0])
    return copy
