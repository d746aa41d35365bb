"""OpenVINO beside ONNX Runtime, behind the little of a session's interface that benchmarks use.

Wants openvino and nncf; a benchmark leaves these peers out, and says so, where they are missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from contenders import Contender, Feeds
from profiles import Node, read_openvino


class Session:
    """A compiled OpenVINO model that runs like an ONNX Runtime session."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._request = compiled.create_infer_request()

    def run(self, outputs: None, feeds: Feeds) -> list[Any]:
        """The results, in order."""
        results = self._request.infer(feeds, share_inputs=True, share_outputs=True)
        return list(results.values())

    def nodes(self) -> list[Node]:
        """What each node took, in the mean of all runs, if it was compiled with PERF_COUNT."""
        return read_openvino(self._compiled, self._request)


@dataclasses.dataclass(frozen=True)
class OpenVino:
    """An OpenVINO model; `precision` None is the plugin's choice."""

    model: Any
    precision: str | None = None

    def open(self, threads: int) -> Session:
        """A session."""
        return Session(self._compile(threads))

    def open_profiled(self, threads: int) -> Session:
        """A session that knows what its nodes took."""
        return Session(self._compile(threads, PERF_COUNT=True))

    def _compile(self, threads: int, **settings: Any) -> Any:
        import openvino

        settings |= {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if self.precision is not None:
            settings["INFERENCE_PRECISION_HINT"] = self.precision
        return openvino.Core().compile_model(self.model, "CPU", settings)


def openvino_contenders(path: Path, samples: Iterable[Feeds]) -> dict[str, Contender]:
    """OpenVINO in FP32, at its default precision (bf16 where the CPU has it), and NNCF's INT8.

    Args:
        path: The FP32 ONNX file, a transformer.
        samples: What NNCF calibrates with.
    """
    try:
        import nncf
        import openvino
    except ImportError as error:
        print(f"without OpenVINO: {error}")
        return {}
    model = openvino.Core().read_model(path)
    samples = list(samples)
    int8 = nncf.quantize(
        openvino.Core().read_model(path),
        nncf.Dataset(samples),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(samples),
    )
    return {
        "OpenVINO FP32": OpenVino(model, "f32"),
        "OpenVINO default": OpenVino(model),
        "OpenVINO INT8 (NNCF)": OpenVino(int8),
    }
