"""What makes the constant matrix of a product, as operands of the dialect's ops.

    DQ(w, ws)                                 =>   w, ws             int8 per column, int4 in groups
    Cast(w) * ws                              =>   w, ws             fp8
    DQ(w, ws, wz)                             =>   w, ws, wz         W4Z4: int4 in groups from here
    DQ(w, DQ(gs, cs))                         =>   w, gs, cs         W4S8
    … + Gather(wo, groups)                    =>   the same, and offsets wo
    … + DQ(Gather(go, groups), co)            =>   the same, and offsets go co

`groups` are the numbers of the groups that rows lie in, as `rounded_weight` writes them.  Part of
`fold_qdq`.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.graph import constant, dequantize_of
from qcompiler.ir.params import quant_params
from qcompiler.ir.types import PerAxis, PerGroup

__all__ = ["MatrixWeight", "matrix_weight", "split_offsets"]


@dataclasses.dataclass(frozen=True)
class MatrixWeight:
    """A constant matrix [K, N].

    Attributes:
        stored: Its stored values.
        scales: Of each group or column; of two levels those of groups, and of columns.
        zeros: Zero points of groups, if any.
        offsets: Offsets of groups, if any; of two levels those of groups, and of columns.
        block: Rows of a group; 0 for one scale per column.
    """

    stored: ir.Value
    scales: tuple[ir.Value, ...]
    zeros: tuple[ir.Value, ...] = ()
    offsets: tuple[ir.Value, ...] = ()
    block: int = 0

    @property
    def operands(self) -> tuple[ir.Value, ...]:
        """What an op reads, in its order; none reads offsets."""
        return (self.stored, *self.scales, *self.zeros)

    @property
    def op_of_few_bits(self) -> str | None:
        """The name of the products by weights that are stored so, but for the activations."""
        if self.stored.dtype is not ir.DataType.INT4 or not self.block:
            return None
        return "QMatMulW4" + "S8" * (len(self.scales) == 2) + "Z4" * bool(self.zeros)


def matrix_weight(value: ir.Value | None) -> MatrixWeight | None:
    """The constant matrix that `value` is, if it has one of the forms."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Add":
        return _scaled(node)
    for first, second in (node.inputs, reversed(node.inputs)):
        weight = _scaled(dequantize_of(first))
        offsets = () if weight is None else _offsets(second, weight)
        # One kind of scale has one kind of offset.
        if weight is not None and not weight.zeros and len(offsets) == len(weight.scales):
            return dataclasses.replace(weight, offsets=offsets)
    return None


def split_offsets(value: ir.Value | None) -> tuple[ir.Node | None, NDArray[np.float32] | None]:
    """The DequantizeLinear of a matrix, and the offsets of its groups, [G, N], if it has any."""
    weight, add = matrix_weight(value), value.producer() if value is not None else None
    if weight is None or not weight.offsets or add is None:
        return dequantize_of(value), None
    makers = [dequantize_of(operand) for operand in add.inputs]
    scaled = next(maker for maker in makers if maker and maker.inputs[0] is weight.stored)
    levels = [np.asarray(constant(level), np.float32) for level in weight.offsets]
    return scaled, np.asarray(levels[0] if len(levels) == 1 else levels[0] * levels[1])


def _scaled(node: ir.Node | None) -> MatrixWeight | None:
    if node is None or len(node.inputs) < 2:
        return None
    stored, scale, block, axis = node.inputs[0], node.inputs[1], 0, 1
    params = quant_params(node)
    if params is not None:
        match params.type.granularity:
            case PerAxis(axis):
                axis %= 2
            case PerGroup(axis, block):
                axis %= 2
    else:
        widen = stored.producer() if stored is not None else None
        if node.op_type != "Mul" or widen is None or widen.op_type != "Cast":
            return None
        stored = widen.inputs[0]
    if stored is None or stored.const_value is None or len(stored.const_value.shape) != 2:
        return None
    k, n = stored.const_value.shape.numpy()
    expected = (-(-k // block), n) if block else (n,)
    scales = _levels(scale)
    first = constant(scales[0]) if len(scales) == 1 or (scales and block) else None
    if first is None or first.shape != expected or axis != (0 if block else 1):
        return None
    zeros = tuple(zero for zero in node.inputs[2:] if zero is not None)
    few_bits = stored.dtype is ir.DataType.INT4 and block and len(scales) == 1
    if zeros and (not few_bits or zeros[0].const_value is None):
        return None
    return MatrixWeight(stored, tuple(scales), zeros, (), block)


def _levels(scale: ir.Value | None) -> list[ir.Value]:
    """A constant scale, or the int8 [G, N] and the floats [N] that one is made of; else nothing."""
    inner = dequantize_of(scale)
    if inner is None:
        return [scale] if scale is not None and scale.const_value is not None else []
    levels = [level for level in inner.inputs if level and level.const_value is not None]
    return levels if _is_int8_per_column(inner) and len(levels) == 2 else []


def _is_int8_per_column(node: ir.Node) -> bool:
    params = quant_params(node)
    if params is None or len(node.inputs) != 2:
        return False
    per_column = params.type.granularity in (PerAxis(1), PerAxis(-1))
    return params.type.storage is ir.DataType.INT8 and per_column


def _offsets(value: ir.Value | None, weight: MatrixWeight) -> tuple[ir.Value, ...]:
    """The constants that offsets of all elements are made of, one row for each group; or none."""
    widen, column = dequantize_of(value), None
    if widen is not None:
        column = widen.inputs[1] if _is_int8_per_column(widen) else None
        if column is None or column.const_value is None:
            return ()
        value = widen.inputs[0]
    gather = value.producer() if value is not None else None
    if gather is None or gather.op_type != "Gather" or gather.attributes.get_int("axis", 0) != 0:
        return ()
    offsets, rows = gather.inputs
    table, groups, stored = constant(offsets), constant(rows), weight.stored.const_value
    if offsets is None or table is None or groups is None or stored is None or not weight.block:
        return ()
    k, n = stored.shape.numpy()
    if table.shape != (-(-k // weight.block), n) or not np.array_equal(
        groups, np.arange(k) // weight.block
    ):
        return ()
    return (offsets,) if column is None else (offsets, column)
