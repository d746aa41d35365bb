"""OpenVINO beside ONNX Runtime, behind the little of a session's interface that benchmarks use.

Wants openvino and nncf; a benchmark leaves these peers out, and says so, where they are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Feeds = dict[str, Any]
Make = Callable[[int], Any]


class Compiled:
    """A compiled OpenVINO model that runs like an ONNX Runtime session."""

    def __init__(self, model: Any, threads: int, precision: str | None) -> None:
        import openvino

        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if precision is not None:
            settings["INFERENCE_PRECISION_HINT"] = precision
        compiled = openvino.Core().compile_model(model, "CPU", settings)
        self._request = compiled.create_infer_request()

    def run(self, outputs: None, feeds: Feeds) -> list[Any]:
        """The results, in order."""
        results = self._request.infer(feeds, share_inputs=True, share_outputs=True)
        return list(results.values())


def openvino_peers(path: Path, samples: Iterable[Feeds]) -> dict[str, Make]:
    """OpenVINO in FP32, at its default precision (bf16 where the CPU has it), and NNCF's INT8.

    Args:
        path: The FP32 ONNX file, a transformer.
        samples: What NNCF calibrates with.
    """
    import nncf
    import openvino

    model = openvino.Core().read_model(path)
    int8 = nncf.quantize(
        openvino.Core().read_model(path),
        nncf.Dataset(list(samples)),
        model_type=nncf.ModelType.TRANSFORMER,
    )
    return {
        "OpenVINO FP32": lambda threads: Compiled(model, threads, "f32"),
        "OpenVINO default": lambda threads: Compiled(model, threads, None),
        "OpenVINO INT8 (NNCF)": lambda threads: Compiled(int8, threads, None),
    }
