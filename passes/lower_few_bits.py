"""Write products with weights of few bits as ORT's own op, for ORT without anything of ours.

    MatMul(x, DQ(w[K, N], s, z))              =>   MatMulNBits(x, w'[N, blocks, bytes], s', z')
    MatMul(DQ(Q(x, sx), sx), DQ(w, s, z))     =>   the same, with accuracy_level 4
    MatMul(x, DQ(w, s) + o)                   =>   the same, with float zero points -o / s

The inverse of `lift_few_bits`: the same values, in ORT's layout, one row per column of the product,
the first value in the lowest bits.  ORT would make this op of the first form itself; of the second
it does not, because of the pair, and would dequantize the weight in every run.  The pair goes: at
accuracy_level 4 ORT rounds activations to 8 bits inside, per block instead of per token.  Scales of
whole columns, or of larger groups than ORT has, are repeated for blocks of 128.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from qcompiler.ir.decisions import add_note, decide, inherit
from qcompiler.ir.graph import constant, dequantize_of, new_initializer, replace_nodes
from qcompiler.ir.packing import PackedFormat, pack
from qcompiler.ir.params import QuantParams, quant_params
from qcompiler.ir.types import PerAxis, PerGroup
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.matrix_weights import split_offsets

__all__ = ["LowerFewBits"]

_DOMAIN = "com.microsoft"
_COLUMN, _LARGEST = 128, 256
"""The block that a scale per column is repeated for, and the largest that ORT 1.31 opens; of 2 bits
ORT 1.32 opens no larger one either."""


class LowerFewBits(ir.passes.InPlacePass):
    """Replace each MatMul whose weight has 2, 4 or 8 bits in blocks along K."""

    rounds = True

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every product that has the form."""
        nodes = [node for node in model.graph if node.op_type == "MatMul" and node.domain == ""]
        lowered = sum(_try_lower(model.graph, node) for node in nodes)
        if lowered:
            model.graph.opset_imports.setdefault(_DOMAIN, 1)
            common.RemoveUnusedNodesPass()(model)
            FixNames()(model)
        return ir.passes.PassResult(model, lowered > 0)


def _try_lower(graph: ir.Graph, node: ir.Node) -> bool:
    dequantize, offsets = split_offsets(node.inputs[1])
    params, data = quant_params(dequantize), node.inputs[0]
    stored = None if dequantize is None else constant(dequantize.inputs[0])
    if params is None or data is None or stored is None or stored.ndim != 2:
        return False
    bits, block = _bits(params, stored), _block(params)
    if block is None or bits not in (2, 4, 8) or params.scales is None or params.zeros is None:
        return False
    pair = _token_pair(data)
    k, n = stored.shape
    inputs = [
        data if pair is None else pair.inputs[0],
        *_operands(graph, node, params, stored, bits, block, offsets),
    ]
    attributes = {"K": k, "N": n, "bits": bits, "block_size": block}
    attributes |= {} if pair is None else {"accuracy_level": 4}
    new = ir.node("MatMulNBits", inputs, attributes, domain=_DOMAIN, version=1)
    inherit(new, node)
    replace_nodes([node], [new])
    if pair is not None:
        add_note(new, "its activations have no Q and DQ: ORT rounds them itself, per block")
    decide(new, "qdq", f"ORT's own MatMulNBits, {bits} bits in blocks of {block}")
    return True


def _bits(params: QuantParams, stored: NDArray[Any]) -> int:
    """Of a weight; int4 that holds no more than 2 bits, as int2 is stored here, has those."""
    bits = int(params.type.storage.bitwidth)
    if bits != 4 or not params.type.symmetric or not params.type.storage.is_signed():
        return bits
    values = stored.astype(np.int8)
    return 2 if values.min() >= -2 and values.max() <= 1 else bits


def _block(params: QuantParams) -> int | None:
    """Rows that share a scale, in the op; None if they have no such form."""
    match params.type.granularity:
        case PerGroup(axis, size) if axis % 2 == 0 and size >= 16 and not size & (size - 1):
            return size if size <= _LARGEST else _COLUMN
        case PerAxis(axis) if axis % 2 == 1:
            return _COLUMN
    return None


def _token_pair(value: ir.Value) -> ir.Node | None:
    """The Q of a pair with a computed scale that makes `value`."""
    dequantize = dequantize_of(value)
    quantize = dequantize.inputs[0].producer() if dequantize and dequantize.inputs[0] else None
    if quantize is None or quantize.op_type != "QuantizeLinear":
        return None
    return quantize if constant(quantize.inputs[1]) is None else None


def _operands(
    graph: ir.Graph,
    node: ir.Node,
    params: QuantParams,
    stored: NDArray[Any],
    bits: int,
    block: int,
    offsets: NDArray[np.float32] | None,
) -> list[ir.Value | None]:
    """Weight, scales and zero points in ORT's layout."""
    k, n = stored.shape
    blocks, offset = -(-k // block), 2 ** (bits - 1) * params.type.storage.is_signed()
    codes = np.zeros((n, blocks * block), np.int16)
    codes[:, :k] = stored.T.astype(np.int16)
    codes[:, :k] += offset
    scales = np.atleast_2d(np.asarray(params.scales))  # [groups, n]
    zeros = np.broadcast_to(np.asarray(params.zeros).astype(np.int16), scales.shape) + offset
    group = _of_each_block(params, block, blocks)
    scales, zeros = scales[group], zeros[group]
    name = node.name or "product"
    packed = _packed(codes.reshape(n, blocks, block), bits)
    inputs: list[ir.Value | None] = [
        new_initializer(graph, f"{name}_packed", packed),
        new_initializer(graph, f"{name}_scales", np.ascontiguousarray(scales.T)),
    ]
    if offsets is not None:
        points = np.asarray(zeros - offsets[group] / scales, np.float32)
        inputs.append(new_initializer(graph, f"{name}_zero_points", np.ascontiguousarray(points.T)))
    elif (zeros != 2 ** (bits - 1)).any():
        inputs.append(new_initializer(graph, f"{name}_zero_points", _packed(zeros.T, bits)))
    return inputs


def _of_each_block(params: QuantParams, block: int, blocks: int) -> NDArray[np.intp]:
    """The group that each block lies in; a column is one."""
    match params.type.granularity:
        case PerGroup(_, size):
            return np.arange(blocks) * block // size
    return np.zeros(blocks, np.intp)


def _packed(codes: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Codes in bytes, each row of the last axis on its own."""
    if bits == 8:
        return np.ascontiguousarray(codes.astype(np.uint8))
    return pack(codes, PackedFormat("unsigned", bits))  # type: ignore[arg-type]
