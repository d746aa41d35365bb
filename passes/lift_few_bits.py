"""Lift ORT's ops whose weights have few bits, in blocks.

    MatMulNBits(x, w[N, K], ws, wz, bias)   =>   Add(MatMul(x, DQ(w[K, N], ws, wz)), bias)
                                                 axis = 0, block_size as it was
    GatherBlockQuantized(w, i, ws, wz)      =>   Gather(DQ(w, ws, wz), i)      axis = -1

Part of `lift_qoperators`.  ORT stores unsigned values, the first in the lowest bits of a byte, one
row per column of the product, with a zero point in the middle of the range where none is given.
Here they become two's complement in ONNX order, so that the middle is 0: int8 for 8 bits, int4 for
4 and for 2 (int2 needs opset 25).  ORT makes MatMulNBits of such pairs again, at accuracy_level 4,
with activations of 8 bits: so a product of another level, which multiplies floats, stays as it is,
unless `float_products` asks for it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.decisions import add_note
from qcompiler.ir.graph import constant
from qcompiler.ir.packing import PackedFormat, unpack
from qcompiler.passes.lifting import Form, NotLiftedError

__all__ = ["FEW_BITS", "multiplies_floats"]

_INT8 = 4
"""The accuracy_level that ORT gives every MatMulNBits it makes of pairs: activations of 8 bits."""


def multiplies_floats(node: ir.Node) -> str | None:
    """Why pairs would not compute what a MatMulNBits does; None for others, and if they would."""
    if (node.domain, node.op_type) != ("com.microsoft", "MatMulNBits"):
        return None
    level = node.attributes.get_int("accuracy_level", 0)
    if level == _INT8:
        return None
    return (
        f"at accuracy_level {level} it multiplies floats, and pairs would come back as one that "
        "rounds activations to 8 bits (lift-qoperators{float_products=true} lifts it)"
    )


def _matmul_nbits(form: Form) -> ir.Value:
    x, packed, scales, zeros, order, bias = form.inputs(6)
    attributes = form.node.attributes
    bits, block = attributes.get_int("bits", 4), attributes.get_int("block_size")
    n, k = attributes.get_int("N"), attributes.get_int("K")
    stored, steps = constant(packed), constant(scales)
    form.needs_opset(21, "a DequantizeLinear of blocks")
    if form.in_branch:
        # Making MatMulNBits of it again, ORT 1.31 looks for the weight inside the branch and fails.
        raise NotLiftedError("ORT does not find weights in blocks from inside a branch")
    if order is not None and not _in_order(constant(order), k, block):
        raise NotLiftedError("g_idx permutes its groups, blocks of DequantizeLinear are contiguous")
    if bits not in (2, 4, 8):
        raise NotLiftedError(f"no ONNX type has {bits} bits")
    if attributes.get_int("weight_prepacked", 0):
        raise NotLiftedError("its weights are packed for one kind of processor")
    if stored is None or steps is None:
        raise NotLiftedError("its weights are computed")
    blocks = -(-k // block)
    inputs = [
        _stored(form, "weight", _unpack(stored, n, bits)[:, :k].T, bits),
        form.constant("scale", np.ascontiguousarray(steps.reshape(n, blocks).T)),
    ]
    if zeros is not None:
        points = constant(zeros)
        if points is None or points.dtype != np.uint8:
            raise NotLiftedError("its zero points are not constant integers")
        table = _unpack(points, n, bits)[:, :blocks]
        if (table != _middle(bits)).any():
            inputs.append(_stored(form, "zero_point", table.T, bits))
    weight = form.op("DequantizeLinear", inputs, {"axis": 0, "block_size": block})
    product = form.op("MatMul", [x, weight])
    level = attributes.get_int("accuracy_level", 0)
    if level != _INT8 and (multiplies := product.producer()) is not None:
        whose = "ONNX Runtime computes the same pairs with activations of 8 bits"
        add_note(multiplies, f"{whose}, though its accuracy_level was {level}")
    return product if bias is None else form.op("Add", [product, bias])


def _in_order(groups: NDArray[np.int32] | None, k: int, block: int) -> bool:
    """Whether a g_idx says what holds without it: exporters write it for any checkpoint of GPTQ."""
    return groups is not None and np.array_equal(groups[:k], np.arange(k) // block)


def _unpack(packed: NDArray[np.uint8], rows: int, bits: int) -> NDArray[np.uint8]:
    """One stored value per byte, [rows, ...]."""
    table = packed.reshape(rows, -1)
    if bits == 8:
        return table
    length, form = table.shape[1] * 8 // bits, PackedFormat("unsigned", bits)  # type: ignore[arg-type]
    return unpack(table, length, form).astype(np.uint8)


def _middle(bits: int) -> np.uint8:
    return np.uint8(2 ** (bits - 1))


def _stored(form: Form, stem: str, table: NDArray[np.uint8], bits: int) -> ir.Value:
    """Unsigned values, shifted to two's complement."""
    signed = np.ascontiguousarray(table - _middle(bits)).view(np.int8)
    storage = ir.DataType.INT8 if bits == 8 else ir.DataType.INT4
    return form.constant(stem, signed.astype(storage.numpy()), storage)


def _gather(form: Form) -> ir.Value:
    packed, indices, scales, zeros = form.inputs(4)
    attributes = form.node.attributes
    stored = constant(packed)
    form.needs_opset(21, "a DequantizeLinear of blocks")
    if stored is None or scales is None or (zeros is not None and constant(zeros) is None):
        raise NotLiftedError("its table is computed")
    axis = attributes.get_int("quantize_axis", 1) % stored.ndim
    inputs = [packed, scales, *([] if zeros is None else [zeros])]
    if stored.dtype == np.uint8:
        inputs = _table(form, stored, scales, constant(zeros), axis)
    along = {"axis": axis, "block_size": attributes.get_int("block_size", 128)}
    floats = form.op("DequantizeLinear", inputs, along)
    return form.op("Gather", [floats, indices], {"axis": attributes.get_int("gather_axis", 0)})


def _table(
    form: Form,
    packed: NDArray[np.uint8],
    scales: ir.Value,
    points: NDArray[np.uint8] | None,
    axis: int,
) -> list[ir.Value | None]:
    """Stored values, scales and zero points of a table that is packed into bytes."""
    bits = form.node.attributes.get_int("bits", 4)
    if bits not in (2, 4, 8) or axis != packed.ndim - 1 or scales.shape is None:
        raise NotLiftedError("its table is not packed along its last axis")
    rows = packed.shape[:-1]
    table = _unpack(packed, packed.size // packed.shape[-1], bits).reshape(*rows, -1)
    inputs: list[ir.Value | None] = [_stored(form, "table", table, bits), scales]
    if points is not None:
        unpacked = _unpack(points, points.size // points.shape[-1], bits).reshape(*rows, -1)
        unpacked = unpacked[..., : scales.shape.numpy()[-1]]
        if (unpacked != _middle(bits)).any():
            inputs.append(_stored(form, "zero_point", unpacked, bits))
    return inputs


FEW_BITS = {
    ("com.microsoft", "MatMulNBits"): _matmul_nbits,
    ("com.microsoft", "GatherBlockQuantized"): _gather,
}
