"""Others who round weights to 4 bits and write an ONNX file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import version_converter
from weight_cases import Feeds

Write = Callable[[Path, Path, int], None]
"""From a float file to a quantized one, with so many weights per scale."""

ONNXSIM_GROUP = 32
"""The only one that it has."""


def of_onnxruntime(calibration: Sequence[Feeds], head: str) -> dict[str, Write]:
    """What writes a quantized file for a model file and a group size, by name."""
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    def default(symmetric: bool) -> Write:
        def write(source: Path, output: Path, group: int) -> None:
            config = nbits.DefaultWeightOnlyQuantConfig(block_size=group, is_symmetric=symmetric)
            _quantize(config, head, source, output, group, is_symmetric=symmetric)

        return write

    def hqq(source: Path, output: Path, group: int) -> None:
        config = nbits.HQQWeightOnlyQuantConfig(block_size=group)
        _quantize(config, head, source, output, group)

    def k_quant(source: Path, output: Path, group: int) -> None:
        _quantize(nbits.KQuantWeightOnlyQuantConfig(), head, source, output, group)

    def gptq(source: Path, output: Path, group: int) -> None:
        config = nbits.GPTQWeightOnlyQuantConfig(_reader(calibration), block_size=group)
        _quantize(config, head, source, output, group)

    return {
        "ORT RTN, asymmetric": default(False),
        "ORT RTN, symmetric": default(True),
        "ORT HQQ, float zero points": hqq,
        "ORT k-quant": k_quant,
        "ORT GPTQ": gptq,
    }


def _quantize(config: Any, head: str, source: Path, output: Path, group: int, **more: Any) -> None:
    """By ONNX Runtime, in one of its ways."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    excluded = [head] if head else []
    quantizer = MatMulNBitsQuantizer(
        str(source), block_size=group, nodes_to_exclude=excluded, algo_config=config, **more
    )
    quantizer.process()
    # GPTQ does not look at nodes_to_exclude.
    with_float_head(quantizer.model.model, source, head)
    quantizer.model.save_model_to_file(str(output), use_external_data_format=True)


def _reader(calibration: Sequence[Feeds]) -> Any:
    """Samples as ONNX Runtime reads them."""
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._feeds = iter(calibration)

        def get_next(self) -> Feeds | None:
            return next(self._feeds, None)

        def __iter__(self) -> Iterator[Feeds]:
            return iter(calibration)

        def __deepcopy__(self, memo: object) -> Reader:
            return Reader()

    return Reader()


def of_onnxsim(calibration: Sequence[Feeds], head: str) -> dict[str, Write]:
    """onnxsim's, of groups of 32: they spare no product, so that the head is put back."""
    import onnxsim

    def of_opset_21(source: Path) -> onnx.ModelProto:
        """The first with int4; of older models it leaves all as it was."""
        return version_converter.convert_version(onnx.load(source), 21)

    def plain(source: Path) -> onnx.ModelProto:
        return with_float_head(onnxsim.quantize_weight_only_int4(of_opset_21(source)), source, head)

    def write(model: onnx.ModelProto, output: Path) -> None:
        onnx.save(model, output, save_as_external_data=True, location=f"{output.name}.data")

    def nearest(source: Path, output: Path, _: int) -> None:
        write(plain(source), output)

    def gptq(source: Path, output: Path, _: int) -> None:
        write(onnxsim.apply_gptq_cpp(str(source), plain(source), calibration), output)

    def awq(source: Path, output: Path, _: int) -> None:
        write(onnxsim.apply_awq_cpp(str(source), plain(source), calibration), output)

    def hqq(source: Path, output: Path, _: int) -> None:
        rounded = onnxsim.quantize_weight_only_int4_hqq(of_opset_21(source))
        write(with_float_head(rounded, source, head), output)

    return {"onnxsim RTN": nearest, "onnxsim GPTQ": gptq, "onnxsim AWQ": awq, "onnxsim HQQ": hqq}


def stored_bits(file: Path) -> float:
    """Bits per weight of the products of 4 bits in a file, scales and zero points among them.

    What pads a column to a whole block is not counted; 32 where weights are floats again.
    """
    model = onnx.load(file, load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    bits = weights = 0
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            size = {a.name: a.i for a in node.attribute}
            bits += size["K"] * size["N"] * size["bits"]
            weights += size["K"] * size["N"]
            bits += sum(_bits(stored[name]) for name in node.input[2:4] if name)
        elif node.op_type == "DequantizeLinear":
            weights += _elements(stored[node.input[0]])
            bits += sum(_bits(stored[name]) for name in node.input)
    return bits / weights if weights else 32.0


_BITS = {
    onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4, onnx.TensorProto.INT8: 8,
    onnx.TensorProto.UINT8: 8, onnx.TensorProto.FLOAT16: 16, onnx.TensorProto.FLOAT: 32,
}  # fmt: skip


def _bits(tensor: onnx.TensorProto) -> int:
    return _BITS[tensor.data_type] * _elements(tensor)


def _elements(tensor: onnx.TensorProto) -> int:
    return math.prod(tensor.dims)


def with_float_head(model: onnx.ModelProto, source: Path, head: str) -> onnx.ModelProto:
    """The same model, with one product as it was."""
    if not head:
        return model
    original = onnx.load(source)
    (before,) = [node for node in original.graph.node if node.name == head]
    (after,) = [node for node in model.graph.node if before.output[0] in node.output]
    # A weight that is made of the embedding's table is no constant, and is still there.
    there = {tensor.name for tensor in model.graph.initializer}
    missing = [t for t in original.graph.initializer if t.name == before.input[1]]
    model.graph.initializer.extend(t for t in missing if t.name not in there)
    data = after.input[0]
    after.CopyFrom(before)
    after.input[0] = data
    return model
