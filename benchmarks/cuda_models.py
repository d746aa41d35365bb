"""Whole models through ONNX Runtime's CUDA provider: ours beside its float16 and its MatMulNBits.

A decoder's step with 512 tokens behind it, as SmolLM2-135M, and an encoder at batch 64 x 128, as
MiniLM: both made on the spot (`cuda_graphs.py`).  Part of `cuda.py`.
"""

from __future__ import annotations

import functools
import logging
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from cuda_clock import settled
from cuda_graphs import MINILM, SMOLLM2, Array, decoder, encoder
from cuda_tasks import Task

import qcompiler
from qcompiler.bundle import Manifest
from qcompiler.registration import is_registered

__all__ = ["model_tasks", "prepare_models"]

TARGETS = ("cuda-int4", "cuda-int8", "cuda-fp8")
CASES: dict[str, tuple[Callable[[Any], onnx.ModelProto], Any, dict[str, int]]] = {
    "SmolLM2-135M decode": (decoder, SMOLLM2, {"past": 512}),
    "MiniLM-L6 batch 64": (encoder, MINILM, {"batch": 64, "tokens": 128}),
}
_PEERS = ("ORT FP32", "ORT FP16", "ORT MatMulNBits")


def model_tasks(
    folder: Callable[[], Path],
    provider: str = "CUDAExecutionProvider",
    targets: Sequence[str] = TARGETS,
) -> list[Task]:
    """The time of a run of each model in each form, in milliseconds, each as a task of its own.

    Args:
        folder: What `prepare_models` made, or where models are made and compiled now.
        provider: Of ONNX Runtime; where it is not installed, rows say so.
        targets: Ours.
    """
    # Whether there is a folder at all matters to who runs a task.
    return [
        (f"{name}, {contender}", functools.partial(
            _row, folder, provider, targets, name, contender))
        for name in CASES for contender in (*_PEERS, *targets)
    ]  # fmt: skip


def _row(
    folder: Callable[[], Path], provider: str, targets: Sequence[str], name: str, contender: str
) -> list[dict[str, Any]]:
    import onnxruntime as ort

    row: dict[str, Any] = {"model": name, "contender": contender}
    if provider in ort.get_available_providers():
        every = _contenders(folder(), targets)
        make = next(make for *which, make in every if which == [name, contender])
        row["milliseconds"] = _time(_session(make(), provider), provider, CASES[name][2])
    else:
        row["problem"] = f"onnxruntime {ort.__version__} has no {provider}: onnxruntime-gpu has"
    said = row.get("problem") or f"{row['milliseconds']:.3f} ms"
    print(f"  {name:22} {contender:18} {said}", file=sys.stderr)
    return [row]


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
        yield from ((name, *each) for each in zip(_PEERS, (source, half, bits), strict=True))
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

    logging.getLogger().setLevel(logging.WARNING)  # it says a line or two of each node
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
    """Of a bundle, with its kernels.

    Raises:
        RuntimeError: ONNX Runtime went on without the provider, or without kernels.
        UserWarning: As `qcompiler.load` said it.
    """
    import onnxruntime as ort

    if hasattr(ort, "preload_dlls") and provider.startswith("CUDA"):
        ort.preload_dlls()
    options = ort.SessionOptions()
    if path.is_dir():
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # bodies or twins would be timed
            session = qcompiler.load(path, providers=[provider], session_options=options)
        library = Manifest.read(path).library
        if library is not None and not is_registered(options, library):
            raise RuntimeError("no kernel was registered; the library says why on stderr")
    else:
        session = ort.InferenceSession(str(path), options, providers=[provider])
    if provider not in session.get_providers():
        raise RuntimeError(f"ONNX Runtime could not make its {provider}; it says why on stderr")
    return session


def _time(session: Any, provider: str, dimensions: Mapping[str, int]) -> float:
    """A run whose inputs and outputs lie on the device, in milliseconds."""
    import onnxruntime as ort

    device = "cuda" if provider.startswith("CUDA") else "cpu"
    binding = session.io_binding()
    for given in session.get_inputs():
        shape = [d if isinstance(d, int) else dimensions[d] for d in given.shape]
        value = ort.OrtValue.ortvalue_from_numpy(_values(given.type, shape), device, 0)
        binding.bind_ortvalue_input(given.name, value)
    for made in session.get_outputs():
        binding.bind_output(made.name, device)

    def replay() -> float:
        begin = time.perf_counter()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return time.perf_counter() - begin

    return settled(replay) * 1e3


def _values(kind: str, shape: Sequence[int]) -> Array:
    random = np.random.default_rng(0)
    if "int64" in kind:
        return random.integers(0, 100, shape)
    return random.standard_normal(shape).astype(np.float16 if "float16" in kind else np.float32)
