"""Others who round weights to 4 bits and write an ONNX file."""

from __future__ import annotations

import contextlib
import math
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime as ort
from onnx import version_converter
from weight_cases import Feeds

Write = Callable[[Path, Path, int], None]
"""From a float file to a quantized one, with so many weights per scale."""

ONNXSIM_GROUP = 32
"""The only one that its own passes have, and llama.cpp, and ONNX Runtime's k-quant."""


def peers_of(group: int) -> list[str]:
    """The names of those that have groups of a size; 0 is one scale per channel."""
    names = ["ORT RTN, asymmetric", "ORT RTN, symmetric", "ORT HQQ, float zero points"]
    names += ["ORT GPTQ", "ORT GPTQ, symmetric"]
    if group != ONNXSIM_GROUP:
        return [*names, *(f"onnxsim MatMulNBits, {way}" for way in ("HQQ", "GPTQ") if group)]
    names += ["ORT k-quant", *(f"onnxsim {way}" for way in ("RTN", "GPTQ", "AWQ", "HQQ"))]
    return [*names, *(f"llama.cpp {way}" for way in ("Q4_0", "Q4_1", "Q4_K"))]


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

    def gptq(symmetric: bool) -> Write:
        def write(source: Path, output: Path, group: int) -> None:
            config = nbits.GPTQWeightOnlyQuantConfig(_reader(calibration), block_size=group)
            with _each_sample_once():
                _quantize(config, head, source, output, group, is_symmetric=symmetric)

        return write

    return {
        "ORT RTN, asymmetric": default(False),
        "ORT RTN, symmetric": default(True),
        "ORT HQQ, float zero points": hqq,
        "ORT k-quant": k_quant,
        "ORT GPTQ": gptq(False),
        "ORT GPTQ, symmetric": gptq(True),
    }


@contextlib.contextmanager
def _each_sample_once() -> Iterator[None]:
    """Spare ONNX Runtime's GPTQ most of its time, and change no value.

    It runs the whole model with all samples once more for every product's input, 120 times for
    SmolLM2, which was not done in 15 minutes.  Here all inputs are written down the first time.
    """
    from onnxruntime.quantization.neural_compressor import weight_only

    with tempfile.TemporaryDirectory() as folder:

        class Session(ort.InferenceSession):  # type: ignore[misc]
            def run(self, names: Sequence[str], feed: Feeds) -> list[Any]:
                there = Path(folder) / f"{id(feed)}"
                if not there.exists():
                    there.mkdir()
                    outputs = [value.name for value in self.get_outputs()]
                    for name, array in zip(outputs, super().run(outputs, feed), strict=True):
                        np.save(there / f"{outputs.index(name)}.npy", array)
                numbers = {value.name: i for i, value in enumerate(self.get_outputs())}
                return [np.load(there / f"{numbers[name]}.npy") for name in names]

        replaced = types.SimpleNamespace(
            InferenceSession=Session, SessionOptions=ort.SessionOptions
        )
        with mock.patch.object(weight_only, "ort", replaced):
            yield


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
    """What onnxsim has itself, of groups of 32: no product is spared, so the head is put back."""
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


def of_onnxsim_in_groups(calibration: Sequence[Feeds], head: str) -> dict[str, Write]:
    """Its MatMulNBits, of any groups, as AMD's Quark makes them; per channel without HQQ.

    GPTQ passes errors on only if it is asked to, and reads one sample: here all, side by side.
    """
    from onnxsim.quark_matmul_nbits import quantize_matmul_nbits

    names = list(calibration[0])
    first = calibration[0][names[0]].shape
    same = [feeds for feeds in calibration if feeds[names[0]].shape == first]
    batch = {name: np.concatenate([feeds[name] for feeds in same]) for name in names}

    def written(algorithm: str) -> Write:
        def write(source: Path, output: Path, group: int) -> None:
            rounded, _ = quantize_matmul_nbits(
                onnx.load(source),
                group_size=group,
                algorithm=algorithm,
                exclude_nodes=[head] if head else (),
                gptq_params={"GroupSize": group, "PerChannel": True, "WeightSymmetric": False,
                             "Compensate": True},
                calibration=[batch],
            )  # fmt: skip
            onnx.save(rounded, output, save_as_external_data=True, location=f"{output.name}.data")

        return write

    return {
        "onnxsim MatMulNBits, HQQ": written("HQQ"),
        "onnxsim MatMulNBits, GPTQ": written("GPTQ"),
    }


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
