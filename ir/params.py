"""How one QuantizeLinear or DequantizeLinear maps floats to stored values, read off the graph.

    expressed = (stored - zero_point) * scale

A view, never a copy: scale and zero point stay the values that the node reads, constant or
computed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.arithmetic import dequantize
from qcompiler.ir.errors import OptionError
from qcompiler.ir.graph import constant, dequantize_of
from qcompiler.ir.types import Granularity, PerAxis, PerGroup, PerTensor, QuantType

__all__ = ["QuantParams", "quant_params"]


@dataclasses.dataclass(frozen=True)
class QuantParams:
    """The type, scale and zero point of a Q or DQ.

    Attributes:
        type: What is stored.  Symmetric means that the zero point is known to be 0, or absent.
        scale: In ONNX shape: one value, one per slice, or one per group.
        zero_point: In the same shape; None where the node has none, which means 0.
    """

    type: QuantType
    scale: ir.Value
    zero_point: ir.Value | None

    @property
    def is_per_tensor(self) -> bool:
        """Whether there is one scale, computed or constant."""
        return isinstance(self.type.granularity, PerTensor)

    @property
    def scales(self) -> NDArray[Any] | None:
        """The scales, None if they are computed; of two levels their product."""
        maker = dequantize_of(self.scale)
        inner = quant_params(maker)
        if maker is None or inner is None:
            return constant(self.scale)
        stored, scales, zeros = constant(maker.inputs[0]), inner.scales, inner.zeros
        if stored is None or scales is None or zeros is None:
            return None
        return dequantize(stored, scales, inner.type, zeros)

    @property
    def zeros(self) -> NDArray[Any] | None:
        """The zero points in the storage type, 0 where there are none; None if computed."""
        if self.zero_point is None:
            return np.zeros((), self.type.storage.numpy())
        return constant(self.zero_point)

    def equals(self, other: QuantParams) -> bool:
        """Whether both map every stored value alike, as far as that is known before a run."""
        if self.type.storage is not other.type.storage:
            return False
        if self.type.granularity != other.type.granularity:
            return False
        return _equal(self.scale, self.scales, other.scale, other.scales) and _equal(
            self.zero_point, self.zeros, other.zero_point, other.zeros
        )


def quant_params(node: ir.Node | None) -> QuantParams | None:
    """What a node quantizes or dequantizes by; None if it does neither, or its types are open."""
    if node is None or node.domain not in ("", "ai.onnx") or len(node.inputs) < 2:
        return None
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return None
    scale = node.inputs[1]
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    storage, granularity = _storage(node, zero_point), _granularity(node)
    if scale is None or storage is None or granularity is None:
        return None
    expressed = scale.dtype or ir.DataType.FLOAT
    zeros = np.zeros(()) if zero_point is None else constant(zero_point)
    # ONNX: the zero point of a float8 and of an int32 is 0, computed or not.
    always = storage.is_floating_point() or storage is ir.DataType.INT32
    symmetric = always or (zeros is not None and not np.any(zeros))
    try:
        type = QuantType(storage, expressed, granularity, symmetric)
    except OptionError:  # a type that nothing here folds, as FLOAT8E4M3FNUZ
        return None
    return QuantParams(type, scale, zero_point)


def _storage(node: ir.Node, zero_point: ir.Value | None) -> ir.DataType | None:
    quantizes = node.op_type == "QuantizeLinear"
    stored = node.outputs[0] if quantizes else node.inputs[0]
    if stored is not None and stored.dtype is not None:
        return stored.dtype
    if zero_point is not None and zero_point.dtype is not None:
        return zero_point.dtype
    if not quantizes or zero_point is not None:
        return None
    # ONNX QuantizeLinear-21: output_dtype 0 stands for uint8.
    return ir.DataType(node.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8)


def _granularity(node: ir.Node) -> Granularity | None:
    scale, axis = node.inputs[1], node.attributes.get_int("axis", 1)
    if block := node.attributes.get_int("block_size", 0):
        return PerGroup(axis, block)
    maker = scale.producer() if scale is not None else None
    if maker is not None and maker.op_type == "DynamicQuantizeLinear":
        return PerTensor()
    if scale is None or scale.shape is None:
        return None
    # ORT takes a list of one scale for a scale per tensor.
    if all(size == 1 for size in scale.shape):
        return PerTensor()
    return PerAxis(axis) if len(scale.shape) == 1 else None


def _equal(
    a: ir.Value | None,
    a_array: NDArray[Any] | None,
    b: ir.Value | None,
    b_array: NDArray[Any] | None,
) -> bool:
    if a_array is None or b_array is None:
        return a is b
    return bool(np.array_equal(np.squeeze(a_array), np.squeeze(b_array)))
