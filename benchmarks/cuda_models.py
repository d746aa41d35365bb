"""Whole models through ONNX Runtime's CUDA provider: ours beside its float16 and its MatMulNBits.

A decoder's step with 512 tokens behind it, as SmolLM2-135M, and an encoder at batch 64 x 128, as
MiniLM: both made on the spot (`cuda_graphs.py`).  Part of `cuda.py`.
"""

from __future__ import annotations

import functools
import shutil
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

__all__ = ["prepare_models", "whole_models"]

TARGETS = ("cuda-int4", "cuda-int8", "cuda-fp8")
CASES: dict[str, tuple[Callable[[Any], onnx.ModelProto], Any, dict[str, int]]] = {
    "SmolLM2-135M decode": (decoder, SMOLLM2, {"past": 512}),
    "MiniLM-L6 batch 64": (encoder, MINILM, {"batch": 64, "tokens": 128}),
}
RUNS = 50


def whole_models(
    provider: str = "CUDAExecutionProvider",
    targets: Sequence[str] = TARGETS,
    prepared: Path | None = None,
) -> list[dict[str, Any]]:
    """The median time of a run of each model in each form, in milliseconds; or why there is none.

    Args:
        provider: Of ONNX Runtime.
        targets: Ours.
        prepared: What `prepare_models` made; else models are made and compiled here.

    Raises:
        RuntimeError: The provider is not installed.
    """
    import onnxruntime as ort

    if provider not in ort.get_available_providers():
        raise RuntimeError(f"this onnxruntime has no {provider}: pip install onnxruntime-gpu")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, contender, make in _contenders(prepared or Path(scratch), targets):
            row: dict[str, Any] = {"model": name, "contender": contender}
            try:
                row["milliseconds"] = _time(_session(make(), provider), provider, CASES[name][2])
            except Exception as error:  # whatever it is, the others are to be timed
                row["problem"] = (str(error).splitlines() or [repr(error)])[0][:300]
            said = row.get("problem") or f"{row['milliseconds']:.3f} ms"
            print(f"  {name:22} {contender:18} {said}", file=sys.stderr)
            rows.append(row)
    return rows


def prepare_models(
    folder: Path, tell: Callable[[str], None], targets: Sequence[str] = TARGETS
) -> None:
    """Make every model in every form, in the place of what the folder had."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, contender, make in _contenders(folder, targets):
        path = make()
        files = path.rglob("*") if path.is_dir() else [path]
        size = sum(file.stat().st_size for file in files if file.is_file())
        tell(f"{name}, {contender}: {size / 1e6:.0f} MB")


def _contenders(
    folder: Path, targets: Sequence[str]
) -> Iterator[tuple[str, str, Callable[[], Path]]]:
    """Models, contenders, and what gives the file or bundle, which it makes if there is none."""
    for name, (build, sizes, _) in CASES.items():
        place = folder / sizes.name
        source = functools.partial(_made, place / "model.onnx", functools.partial(build, sizes))
        half = functools.partial(_made, place / "half.onnx", functools.partial(_half, source))
        bits = functools.partial(
            _made, place / "four_bits.onnx", functools.partial(_four_bits, half)
        )
        yield name, "ORT FP32", source
        yield name, "ORT FP16", half
        yield name, "ORT MatMulNBits", bits
        for target in targets:
            yield name, target, functools.partial(_ours, source, place, target)


def _made(path: Path, make: Callable[[], onnx.ModelProto]) -> Path:
    """The file, which is made if there is none, and then whole."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        onnx.save(make(), new)
        new.rename(path)
    return path


def _half(source: Callable[[], Path]) -> onnx.ModelProto:
    """By ONNX Runtime's own converter; inputs and outputs too, which spares it casts."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    converted: onnx.ModelProto = convert_float_to_float16(onnx.load(source()), keep_io_types=False)
    return converted


def _four_bits(half: Callable[[], Path]) -> onnx.ModelProto:
    """Groups of 128, symmetric, in its float16 model."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(half()), block_size=128, is_symmetric=True)
    quantizer.process()
    quantized: onnx.ModelProto = quantizer.model.model
    return quantized


def _ours(source: Callable[[], Path], place: Path, target: str) -> Path:
    bundle = place / target
    if not bundle.exists():
        qcompiler.compile(source(), target, bundle, timing=False)
    return bundle


def _session(path: Path, provider: str) -> Any:
    import onnxruntime as ort

    if hasattr(ort, "preload_dlls") and provider.startswith("CUDA"):
        ort.preload_dlls()
    if path.is_dir():
        return qcompiler.load(path, providers=[provider])
    return ort.InferenceSession(str(path), providers=[provider])


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
