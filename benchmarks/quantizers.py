"""Others who quantize, each as its documentation says that it is best, and we.

Ours is what `qcompile --target x86-int8 --calib DATA` gives, but for the timing of kernels: choices
by measured time would make figures of accuracy depend on the machine.

On processors without VNNI, ONNX Runtime's sums of uint8 by int8 products saturate; its remedy, the
session option `session.x64quantprecision`, is on there for all of its models but those that are
called saturating.  With VNNI it would only make them slower.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import onnx.version_converter
import onnxruntime as ort
from contenders import Bundle, Contender, Feeds
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from peers import OpenVino
from tasks import Task

import qcompiler
from qcompiler.passes.node_rules import NodeRule
from qcompiler.session_options import sums_saturate

OURS, ORT_STATIC, STATIC = "qcompiler", "ORT static", "static.onnx"
EXACT = "session.x64quantprecision"


@dataclasses.dataclass(frozen=True)
class InOrt:
    """A model that somebody else quantized, in ONNX Runtime."""

    path: Path
    exact: bool = True

    def open(self, threads: int) -> ort.InferenceSession:
        """A session."""
        return ort.InferenceSession(self.path, _options(threads, self.exact))


@dataclasses.dataclass(frozen=True)
class Saturating:
    """A bundle whose convolutions saturate, as a model does in ONNX Runtime by default."""

    path: Path

    def open(self, threads: int) -> ort.InferenceSession:
        """A session."""
        return qcompiler.load(self.path, session_options=_options(threads, exact=False))


def _options(threads: int, exact: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry(EXACT, str(int(exact and sums_saturate())))
    options.log_severity_level = 3
    return options


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Samples, one by one."""

    def __init__(self, samples: list[Feeds]) -> None:
        self._left: Iterator[Feeds] = iter(samples)

    def get_next(self) -> Feeds | None:
        """The next sample, None after the last."""
        return next(self._left, None)


Quantizer = Callable[[Task, Path], Contender]
"""Given a task and an empty folder, the quantized model."""


def float32(task: Task, folder: Path) -> Contender:
    """Nothing is quantized."""
    return InOrt(task.model)


def ours(task: Task, folder: Path, recipe: qcompiler.Recipe | None = None) -> Contender:
    """`qcompile --target x86-int8 --calib` with nothing else said."""
    if not (bundle := folder / "bundle").exists():
        qcompiler.compile(
            task.model, "x86-int8", bundle, calibration=lambda: task.calibration,
            recipe=recipe, timing=False,
        )  # fmt: skip
    return Bundle(bundle)


def ours_saturating(task: Task, folder: Path) -> Contender:
    """The bundle that `ours` made, if it did."""
    ours(task, folder.parent / OURS)
    return Saturating(folder.parent / OURS / "bundle")


def our_static(task: Task, folder: Path) -> Contender:
    """Products of weights with one static scale for all tokens, too."""
    return ours(task, folder, qcompiler.Recipe(nodes=_STATIC))


def our_static_unsmoothed(task: Task, folder: Path) -> Contender:
    """The same without moving outliers into the weights."""
    return ours(task, folder, qcompiler.Recipe(nodes=_STATIC, smooth=False))


def our_static_uncorrected(task: Task, folder: Path) -> Contender:
    """The same without bias correction."""
    options = {"bias-correction": {"least": 1.0}}
    return ours(task, folder, qcompiler.Recipe(nodes=_STATIC, passes=options))


def our_static_products(task: Task, folder: Path) -> Contender:
    """The same with the products of attention in 8 bits, too."""
    options = {"assign-precision": {"products": True}}
    return ours(task, folder, qcompiler.Recipe(nodes=_STATIC, passes=options))


_STATIC = (NodeRule(op="MatMul", activation="static"),)


def ort_static(
    task: Task, folder: Path, method: CalibrationMethod = CalibrationMethod.MinMax
) -> Contender:
    """QDQ, uint8 activations, int8 weights per channel, after quant_pre_process."""
    if (output := folder / STATIC).exists():
        return InOrt(output)
    prepared = _prepared(task, folder)
    quantize_static(
        prepared, output, Reader(task.calibration), QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, calibrate_method=method,
    )  # fmt: skip
    return InOrt(output)


def ort_static_saturating(task: Task, folder: Path) -> Contender:
    """The model that `ort_static` made, if it did."""
    made = folder.parent / ORT_STATIC
    made.mkdir(exist_ok=True)
    ort_static(task, made)
    return InOrt(made / STATIC, exact=False)


def ort_static_products(task: Task, folder: Path) -> Contender:
    """The same, but for MatMuls alone: what transformers are advised to."""
    prepared, output = _prepared(task, folder), folder / STATIC
    quantize_static(
        prepared, output, Reader(task.calibration), QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul"],
        extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["MatMul"]},
    )  # fmt: skip
    return InOrt(output)


def _prepared(task: Task, folder: Path) -> Path:
    """The model as ONNX Runtime's quantizers want it: opset 13 at least, and optimized."""
    modern, prepared = folder / "modern.onnx", folder / "prepared.onnx"
    onnx.save(_modern(task.model), modern)
    quant_pre_process(modern, prepared, skip_symbolic_shape=True)
    return prepared


def _modern(model: Path) -> onnx.ModelProto:
    """The model at opset 13 or later: earlier ones have no scales per channel."""
    loaded = onnx.load(model)
    opset = max(entry.version for entry in loaded.opset_import if entry.domain in ("", "ai.onnx"))
    return loaded if opset >= 13 else onnx.version_converter.convert_version(loaded, 13)


def ort_dynamic(task: Task, folder: Path) -> Contender:
    """Products of weights, per channel: what transformers are advised to."""
    output = folder / "dynamic.onnx"
    quantize_dynamic(task.model, output, per_channel=True, weight_type=QuantType.QInt8,
                     op_types_to_quantize=["MatMul"])  # fmt: skip
    return InOrt(output)


def nncf_onnx(task: Task, folder: Path) -> Contender:
    """NNCF's QDQ model in ONNX Runtime."""
    import nncf

    output = folder / "nncf.onnx"
    model = _modern(task.model)
    onnx.save(nncf.quantize(model, nncf.Dataset(task.calibration), **_nncf_options(task)), output)
    return InOrt(output)


def nncf_openvino(task: Task, folder: Path) -> Contender:
    """NNCF's model in OpenVINO, for which it is made."""
    import nncf
    import openvino

    model = openvino.Core().read_model(task.model)
    options = _nncf_options(task)
    # Without VNNI OpenVINO's sums saturate.  NNCF's default halves the first layer's weights for
    # that; halving all of them (OverflowFix.ENABLE) was worse on ResNet50: 16.5 dB, not 19.6.
    made = nncf.quantize(model, nncf.Dataset(task.calibration), **options)
    return OpenVino(made, "f32")


def _nncf_options(task: Task) -> dict[str, object]:
    import nncf

    kind = nncf.ModelType.TRANSFORMER if task.transformer else None
    # MIXED is asymmetric for activations that are, which costs nothing in these runtimes.
    return {
        "preset": nncf.QuantizationPreset.MIXED,
        "model_type": kind,
        "subset_size": len(task.calibration),
        "fast_bias_correction": True,
    }


def onnxsim_static(task: Task, folder: Path) -> Contender:
    """The quantizer of onnxsim, with the calibration that its search picks, biases corrected."""
    import onnxsim

    model, few = _modern(task.model), task.calibration[:16]
    picked = onnxsim.pick_calibration(model, task.calibration, eval_data=few)
    try:
        made = onnxsim.correct_bias(model, picked.model, few)
    except ValueError:  # it wants samples of one size
        made = picked.model
    output = folder / "onnxsim.onnx"
    onnx.save(made, output)
    return InOrt(output)


COMMON: dict[str, Quantizer] = {
    "ORT FP32": float32,
    OURS: ours,
    f"{OURS}, saturating": ours_saturating,
    ORT_STATIC: ort_static,
    f"{ORT_STATIC}, saturating": ort_static_saturating,
    "NNCF in ORT": nncf_onnx,
    "NNCF in OpenVINO": nncf_openvino,
    "onnxsim static": onnxsim_static,
}
TRANSFORMERS: dict[str, Quantizer] = {
    "qcompiler static": our_static,
    "qcompiler static, not smoothed": our_static_unsmoothed,
    "qcompiler static, biases as they were": our_static_uncorrected,
    "qcompiler static, with attention": our_static_products,
    "ORT dynamic": ort_dynamic,
    "ORT static, MatMul only": ort_static_products,
}


def quantizers(task: Task) -> dict[str, Quantizer]:
    """Everybody who can quantize a task's model."""
    return COMMON | (TRANSFORMERS if task.transformer else {})
