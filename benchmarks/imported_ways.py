"""How the tools of others quantize an ONNX model: ONNX Runtime's, NNCF and onnxsim."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
from contenders import Feeds
from onnx.version_converter import convert_version
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

__all__ = ["WAYS"]


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Samples, one by one."""

    def __init__(self, samples: list[Feeds]) -> None:
        self._left: Iterator[Feeds] = iter(samples)

    def get_next(self) -> Feeds | None:
        """The next sample, None after the last."""
        return next(self._left, None)


def static(
    activations: QuantType, form: QuantFormat, **options: Any
) -> Callable[[Path, Path, list[Feeds]], None]:
    def quantize(model: Path, output: Path, samples: list[Feeds]) -> None:
        only = options.get("op_types_to_quantize", [])
        ops = {node.op_type for node in onnx.load(model, load_external_data=False).graph.node}
        if only and not ops & set(only):
            raise ValueError(f"it has no {', '.join(only)}")
        quantize_static(model, output, Reader(samples), form, activation_type=activations,
                        weight_type=QuantType.QInt8, **options)  # fmt: skip

    return quantize


def dynamic(weights: QuantType, per_channel: bool) -> Callable[[Path, Path, list[Feeds]], None]:
    def quantize(model: Path, output: Path, samples: list[Feeds]) -> None:
        quantize_dynamic(model, output, weight_type=weights, per_channel=per_channel)

    return quantize


def by_nncf(model: Path, output: Path, samples: list[Feeds]) -> None:
    import nncf

    content = onnx.load(model)
    is_transformer = not any(node.op_type == "Conv" for node in content.graph.node)
    kind = nncf.ModelType.TRANSFORMER if is_transformer else None
    dataset = nncf.Dataset(samples)
    onnx.save(nncf.quantize(content, dataset, model_type=kind, subset_size=len(samples)), output)


def by_onnxsim(name: str, **options: Any) -> Callable[[Path, Path, list[Feeds]], None]:
    def quantize(model: Path, output: Path, samples: list[Feeds]) -> None:
        import onnxsim

        # Before opset 21 it leaves alone what it would store in 4 or 16 bits.
        content = convert_version(onnx.load(model), 21)
        calibration = {"calibration_data": samples} if name in _CALIBRATED else {}
        quantized = getattr(onnxsim, name)(content, **calibration, **options)
        if not {node.op_type for node in quantized.graph.node} - {
            node.op_type for node in content.graph.node
        }:
            raise ValueError("it leaves the model as it is")
        onnx.save(quantized, output)

    return quantize


_CALIBRATED = ("quantize_static", "quantize_static_int16", "quantize_qoperator")

WAYS: dict[str, Callable[[Path, Path, list[Feeds]], None]] = {
    "ort-dynamic": dynamic(QuantType.QInt8, per_channel=True),
    "ort-dynamic-uint8": dynamic(QuantType.QUInt8, per_channel=False),
    "ort-static-qdq": static(QuantType.QUInt8, QuantFormat.QDQ, per_channel=True),
    "ort-static-qdq-int8": static(QuantType.QInt8, QuantFormat.QDQ, per_channel=True),
    "ort-static-qdq-matmul": static(
        QuantType.QUInt8, QuantFormat.QDQ, per_channel=True, op_types_to_quantize=["MatMul"],
        extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": ["MatMul"]},
    ),
    "ort-static-qoperator": static(QuantType.QUInt8, QuantFormat.QOperator),
    "nncf": by_nncf,
    "onnxsim-dynamic": by_onnxsim("quantize_dynamic"),
    "onnxsim-dynamic-fused": by_onnxsim("quantize_dynamic_matmul_integer_to_float"),
    "onnxsim-static": by_onnxsim("quantize_static"),
    "onnxsim-static-full": by_onnxsim("quantize_static", full_graph=True),
    "onnxsim-static-int16": by_onnxsim("quantize_static_int16"),
    "onnxsim-qoperator": by_onnxsim("quantize_qoperator"),
    "onnxsim-weight-only": by_onnxsim("quantize_weight_only"),
    "onnxsim-int8-block": by_onnxsim("quantize_weight_only_int8_block"),
    "onnxsim-int4": by_onnxsim("quantize_weight_only_int4"),
    "onnxsim-matmul-nbits": by_onnxsim("quantize_weight_only_matmul_nbits"),
}  # fmt: skip
