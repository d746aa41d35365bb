"""Whole models through ONNX Runtime's CUDA provider: ours beside its float16 and its MatMulNBits.

A decoder's step with 512 tokens behind it, as SmolLM2-135M, and an encoder at batch 64 x 128, as
MiniLM: both made on the spot (`cuda_graphs.py`).  Part of `cuda.py`.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from cuda_graphs import MINILM, SMOLLM2, Array, decoder, encoder

import qcompiler

__all__ = ["whole_models"]

TARGETS = ("cuda-int4", "cuda-int8", "cuda-fp8")
CASES: dict[str, tuple[Callable[[Any], onnx.ModelProto], Any, dict[str, int]]] = {
    "SmolLM2-135M decode": (decoder, SMOLLM2, {"past": 512}),
    "MiniLM-L6 batch 64": (encoder, MINILM, {"batch": 64, "tokens": 128}),
}
RUNS = 50


def whole_models(
    provider: str = "CUDAExecutionProvider", targets: Sequence[str] = TARGETS
) -> list[dict[str, Any]]:
    """The median time of a run of each model in each form, in milliseconds; or why there is none.

    Raises:
        RuntimeError: The provider is not installed.
    """
    import onnxruntime as ort

    if provider not in ort.get_available_providers():
        raise RuntimeError(f"this onnxruntime has no {provider}: pip install onnxruntime-gpu")
    rows = []
    for name, (build, sizes, dimensions) in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            source = folder / "model.onnx"
            onnx.save(build(sizes), source)
            for contender, make in _contenders(source, folder, targets, provider):
                row: dict[str, Any] = {"model": name, "contender": contender}
                try:
                    row["milliseconds"] = _time(make(), provider, dimensions)
                except Exception as error:  # whatever it is, the others are to be timed
                    row["problem"] = str(error).splitlines()[0][:300]
                said = row.get("problem") or f"{row['milliseconds']:.3f} ms"
                print(f"  {name:22} {contender:18} {said}", file=sys.stderr)
                rows.append(row)
    return rows


def _contenders(
    source: Path, folder: Path, targets: Sequence[str], provider: str
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What makes a session of each."""
    yield "ORT FP32", lambda: _plain(source, provider)
    yield "ORT FP16", lambda: _plain(_half(source, folder), provider)
    yield "ORT MatMulNBits", lambda: _plain(_four_bits(source, folder), provider)
    for target in targets:
        yield target, lambda target=target: _ours(source, folder, target, provider)


def _plain(path: Path, provider: str) -> Any:
    import onnxruntime as ort

    if hasattr(ort, "preload_dlls") and provider.startswith("CUDA"):
        ort.preload_dlls()
    return ort.InferenceSession(str(path), providers=[provider])


def _half(source: Path, folder: Path) -> Path:
    """By ONNX Runtime's own converter; inputs and outputs too, which spares it casts."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    path = folder / "half.onnx"
    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=False), path)
    return path


def _four_bits(source: Path, folder: Path) -> Path:
    """Groups of 128, symmetric, in its float16 model."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    path = folder / "four_bits.onnx"
    quantizer = MatMulNBitsQuantizer(
        onnx.load(_half(source, folder)), block_size=128, is_symmetric=True
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(path))
    return path


def _ours(source: Path, folder: Path, target: str, provider: str) -> Any:
    report = qcompiler.compile(source, target, folder / target, timing=False)
    return qcompiler.load(report.bundle, providers=[provider])


def _time(session: Any, provider: str, dimensions: Mapping[str, int]) -> float:
    """The median of a run whose inputs and outputs lie on the device."""
    import onnxruntime as ort

    device = "cuda" if provider.startswith("CUDA") else "cpu"
    binding = session.io_binding()
    for given in session.get_inputs():
        shape = [d if isinstance(d, int) else dimensions[d] for d in given.shape]
        value = ort.OrtValue.ortvalue_from_numpy(_values(given.type, shape), device, 0)
        binding.bind_ortvalue_input(given.name, value)
    for made in session.get_outputs():
        binding.bind_output(made.name, device)
    times = []
    for _ in range(RUNS + 10):
        begin = time.perf_counter()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times[10:])


def _values(kind: str, shape: Sequence[int]) -> Array:
    random = np.random.default_rng(0)
    if "int64" in kind:
        return random.integers(0, 100, shape)
    return random.standard_normal(shape).astype(np.float16 if "float16" in kind else np.float32)
