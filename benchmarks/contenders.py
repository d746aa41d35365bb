"""Who is measured in ONNX Runtime: a model in several forms, and our bundles.

A contender opens sessions and profiles itself, here as in `peers.py`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Protocol

import onnxruntime as ort
from onnx import TensorProto
from onnxruntime.quantization import QuantType, quantize_dynamic
from profiles import Traced

import qcompiler

Feeds = dict[str, Any]

UNFUSED = ("SkipLayerNormFusion",)


class Contender(Protocol):
    """What can be measured."""

    def open(self, threads: int) -> Any:
        """A session: it has `run(None, feeds)`."""

    def open_profiled(self, threads: int) -> Any:
        """A session that also has `nodes()`: what each took in the runs so far."""


class _InOrt(ABC):
    """Opens in ONNX Runtime."""

    def open(self, threads: int) -> ort.InferenceSession:
        return self._open(_options(threads))

    def open_profiled(self, threads: int) -> Traced:
        return Traced(_options(threads), self._open)

    @abstractmethod
    def _open(self, options: ort.SessionOptions) -> ort.InferenceSession:
        """A session with these options."""


@dataclasses.dataclass(frozen=True)
class Stock(_InOrt):
    """An ONNX file, some of ONNX Runtime's optimizers off."""

    path: Path
    disabled: tuple[str, ...] = ()

    def _open(self, options: ort.SessionOptions) -> ort.InferenceSession:
        return ort.InferenceSession(self.path, options, disabled_optimizers=list(self.disabled))


@dataclasses.dataclass(frozen=True)
class Bundle(_InOrt):
    """A bundle, with its kernels or without."""

    path: Path
    native: bool = True

    def _open(self, options: ort.SessionOptions) -> ort.InferenceSession:
        return qcompiler.load(self.path, session_options=options, native=self.native)


def ort_contenders(
    model: Path,
    folder: Path,
    *,
    model_type: str,
    heads: int,
    hidden: int,
    eager: Path | None = None,
) -> dict[str, Contender]:
    """FP32 and dynamic INT8 of a transformer, each in the forms that its users choose from.

    As exported, after onnxruntime.transformers.optimizer, and both with the fusion of
    SkipLayerNormalization off, which is slower than what it replaces on some models.

    Args:
        model: The FP32 ONNX file.
        folder: Where the other files go.
        model_type: What the optimizer takes the model for.
        heads: Attention heads.
        hidden: Width of the model.
        eager: The same model in a form that the optimizer makes more of, if there is one.
    """
    optimized, unfused = folder / "optimized.onnx", folder / "optimized-unfused.onnx"
    for path, skip in ((optimized, True), (unfused, False)):
        _optimize(eager or model, path, model_type, heads, hidden, skip)
    result: dict[str, Contender] = {}
    for kind in ("FP32", "dynamic INT8"):
        files = [model, optimized, unfused]
        if kind != "FP32":
            files = [_dynamic(file, folder / f"dynamic-{file.name}") for file in files]
        exported, fused, separate = files
        result |= {
            f"ORT {kind}": Stock(exported),
            f"ORT {kind}, SkipLayerNorm off": Stock(exported, UNFUSED),
            f"ORT {kind}, optimized": Stock(fused),
            f"ORT {kind}, optimized, SkipLayerNorm off": Stock(separate, UNFUSED),
        }
    return result


def our_contenders(
    model: Path, folder: Path, calibration: Path | None = None
) -> dict[str, Contender]:
    """A model compiled for x86-int8; the same with other attentions; without its kernels.

    Args:
        model: The FP32 ONNX file.
        folder: Where the bundles go.
        calibration: Samples, where the model needs static ranges.
    """
    plain, bfloat16, float32 = (
        qcompiler.compile(
            model,
            "x86-int8",
            folder / str(attention),
            recipe=qcompiler.Recipe(attention=attention),
            calibration=calibration,
        )
        for attention in (None, "bfloat16", "float32")
    )
    return {
        "qcompiler x86-int8": Bundle(plain.bundle),
        "qcompiler, bfloat16 attention": Bundle(bfloat16.bundle),
        "qcompiler, float32 attention": Bundle(float32.bundle),
        "qcompiler, bodies only": Bundle(plain.bundle, native=False),
    }


def _options(threads: int) -> ort.SessionOptions:
    result = ort.SessionOptions()
    result.intra_op_num_threads = threads
    # The threads of the session before would hold a core that the next one needs.
    result.add_session_config_entry("session.force_spinning_stop", "1")
    result.log_severity_level = 3
    return result


def _optimize(model: Path, path: Path, kind: str, heads: int, hidden: int, skip: bool) -> None:
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    options = FusionOptions(kind)
    options.enable_skip_layer_norm = skip
    optimized = optimizer.optimize_model(
        str(model), kind, heads, hidden, optimization_options=options
    )
    optimized.save_model_to_file(str(path), use_external_data_format=True)
    if skip:
        fused = {k: n for k, n in optimized.get_fused_operator_statistics().items() if n}
        print(f"the transformer optimizer fused {fused}")


def _dynamic(model: Path, path: Path) -> Path:
    """Per channel, what has weights of a matrix product."""
    # The type of what a fused op gives is not inferred.
    extra = {"DefaultTensorType": TensorProto.FLOAT}
    quantize_dynamic(
        model,
        path,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul", "Attention"],
        use_external_data_format=True,
        extra_options=extra,
    )
    return path
