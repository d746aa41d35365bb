"""How near a bundle is to the model that it was made of, and who computes its layers."""

from __future__ import annotations

import collections
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from contenders import Feeds

import qcompiler
from qcompiler.bundle import Manifest
from qcompiler.exact_copy import save_exact
from qcompiler.timing.exact_source import exact_source

__all__ = ["agreements", "layers"]

DRAWS = 8
"""Of last bits: whether one moves a value over the middle between two steps is a matter of luck."""

LAYERS = "MatMul|Conv|Gemm|LSTM|GRU"
"""What counts as a layer, by its op."""


def layers(bundle: Path) -> dict[str, Any]:
    """How many layers who computes, and of those that no kernel does, why, most often first."""
    made = [d for d in Manifest.read(bundle).decisions if re.search(LAYERS, d["op"])]
    left = collections.Counter(d["why"] for d in made if d["action"] != "kernel")
    counted = collections.Counter(d["action"] for d in made)
    return {"layers": dict(counted), "left": dict(left.most_common(8))}


def agreements(
    source: Path, bundle: Path, original: Path | None, samples: list[Feeds]
) -> dict[str, dict[str, float]]:
    """The bundle, and ONNX Runtime in several ways, against what the source means; and FP32."""
    plain = ort.SessionOptions()
    plain.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    exact, ours = exact_outputs(source, samples), outputs(qcompiler.load(bundle), samples)
    assert exact is not None
    found = {
        "bundle": ours,
        "bundle_without_kernels": outputs(qcompiler.load(bundle, native=False), samples),
        "source_as_it_comes": outputs(ort.InferenceSession(source), samples),
        "source_unoptimized": outputs(ort.InferenceSession(source, plain), samples),
    }
    with exact_source(source) as copy:
        if copy is not None:
            found["source_with_exact_sums"] = outputs(ort.InferenceSession(copy), samples)
    rows = {name: agreement(exact, results) for name, results in found.items()}
    if (moved := by_last_bits(source, samples, exact)) is not None:
        rows["source_by_last_bits"] = moved
    if original is not None:
        floats = outputs(ort.InferenceSession(original), samples)
        rows |= {
            "fp32_to_source": agreement(floats, exact),
            "fp32_to_bundle": agreement(floats, ours),
        }
    return rows


def by_last_bits(
    source: Path, samples: list[Feeds], exact: list[np.ndarray[Any, Any]]
) -> dict[str, float] | None:
    """How far the source is from itself at worst, moved by last bits; None if it has no vectors."""
    draws = (exact_outputs(source, samples, moved=seed) for seed in range(DRAWS))
    rows = [agreement(exact, results) for results in draws if results is not None]
    return min(rows, key=lambda row: row["sqnr_db"], default=None)


def exact_outputs(
    source: Path, samples: list[Feeds], *, moved: int | None = None
) -> list[np.ndarray[Any, Any]] | None:
    """What the source means; or, moved by last bits, nothing where it has no vectors of floats."""
    model = ir.load(source)
    if moved is not None and not move_by_last_bits(model, moved):
        return None
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "exact.onnx"
        disabled = save_exact(model, copy)
        return outputs(ort.InferenceSession(copy, disabled_optimizers=disabled), samples)


def move_by_last_bits(model: ir.Model, seed: int) -> int:
    """Move each float of biases, norms and scales per channel to a neighbour; how many vectors."""
    random, ends = np.random.default_rng(seed), np.array([-np.inf, np.inf], np.float32)
    moved = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype is ir.DataType.FLOAT and len(tensor.shape) == 1:
            array = tensor.numpy()
            array = np.nextafter(array, ends[random.integers(2, size=array.shape)])
            value.const_value = ir.Tensor(array, name=value.name)
            moved += array.size > 1
    return moved


def outputs(session: ort.InferenceSession, samples: list[Feeds]) -> list[np.ndarray[Any, Any]]:
    """Each result, those for all samples in one row."""
    runs = [session.run(None, sample) for sample in samples]
    return [
        np.concatenate([result.ravel() for result in results])
        for results in zip(*runs, strict=True)
    ]


def agreement(
    expected: list[np.ndarray[Any, Any]], got: list[np.ndarray[Any, Any]]
) -> dict[str, float]:
    """SQNR in dB, at most 200, and cosine, of the output in which they are lowest."""
    worst = {"sqnr_db": 200.0, "cosine": 1.0}
    for a, b in zip(expected, got, strict=True):
        a, b = a.astype(np.float64), b.astype(np.float64)
        signal, other = np.square(a).sum(), np.square(b).sum()
        if signal == other == 0:
            continue
        noise = max(np.square(a - b).sum(), signal * 1e-20)
        worst["sqnr_db"] = min(worst["sqnr_db"], float(10 * np.log10(signal / noise)))
        worst["cosine"] = min(worst["cosine"], float(a @ b / np.sqrt(signal * other)))
    return worst
