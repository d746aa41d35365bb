"""What each node of a run took, as ONNX Runtime's and OpenVINO's profilers tell it."""

from __future__ import annotations

import collections
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]

_CUT = 0.5e-3
"""Milliseconds: ONNX Runtime cuts a duration to whole microseconds, half of one too little."""


@dataclasses.dataclass(frozen=True)
class Node:
    """One node.

    Attributes:
        op: The op's name, or the name of the kernel that replaced it.
        name: The node's name.
        inputs: Shapes of the inputs; weights that were packed are not among them.
        outputs: Shapes of the outputs.
        ms: Milliseconds in a run.
    """

    op: str
    name: str
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    ms: float


class Traced:
    """A session of ONNX Runtime that keeps a trace."""

    def __init__(self, options: Any, open_session: Callable[[Any], Any]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        options.enable_profiling = True
        options.profile_file_prefix = f"{self._folder.name}/trace"
        self._session = open_session(options)

    def run(self, outputs: None, feeds: dict[str, Any]) -> list[Any]:
        """The results, in order."""
        return list(self._session.run(outputs, feeds))

    def nodes(self) -> list[Node]:
        """Each with its median over all runs but the first; ends the trace."""
        with self._folder:
            return _read_trace(Path(self._session.end_profiling()))


def _read_trace(path: Path) -> list[Node]:
    times: dict[str, list[float]] = collections.defaultdict(list)
    events: dict[str, Any] = {}
    for event in json.loads(path.read_text()):
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            times[event["name"]].append(event["dur"] / 1e3 + _CUT)
            events[event["name"]] = event["args"]
    return [
        Node(
            arguments["op_name"],
            name.removesuffix("_kernel_time"),
            _shapes(arguments["input_type_shape"]),
            _shapes(arguments["output_type_shape"]),
            statistics.median(times[name][1:]),
        )
        for name, arguments in events.items()
    ]


def read_openvino(compiled: Any, request: Any) -> list[Node]:
    """The nodes of a compiled OpenVINO model, each with its mean over all runs of `request`."""
    graph = {op.get_friendly_name(): op for op in compiled.get_runtime_model().get_ops()}
    nodes = []
    for info in request.get_profiling_info():
        ms = info.real_time.total_seconds() * 1e3
        if ms and info.node_name in graph:
            op = graph[info.node_name]
            inputs, outputs = (_openvino_shapes(ports) for ports in (op.inputs(), op.outputs()))
            nodes.append(Node(info.node_type, info.node_name, inputs, outputs, ms))
    return nodes


def _shapes(described: list[dict[str, list[int]]]) -> tuple[Shape, ...]:
    return tuple(tuple(shape) for tensor in described for shape in tensor.values())


def _openvino_shapes(ports: Any) -> tuple[Shape, ...]:
    shapes = [port.get_partial_shape() for port in ports]
    return tuple(tuple(shape.to_shape()) for shape in shapes if shape.is_static)
