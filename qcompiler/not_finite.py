"""Constants that hold NaN or infinity, told by what the nodes that read them make of it.

NaN among numbers is damage.  A constant that is NaN throughout may be meant, as what Where puts in,
and infinity as what a mask adds or a Clip is bounded by; neither as what is multiplied.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.errors import ModelError
from qcompiler.ir.graph import every_graph, every_node, label

__all__ = ["notes_on_infinity", "refuse_nan"]

_SCALING = frozenset({
    "BatchNormalization", "Conv", "ConvTranspose", "DequantizeLinear", "Div", "Einsum", "GRU",
    "Gemm", "GroupNormalization", "InstanceNormalization", "LSTM", "LayerNormalization", "MatMul",
    "Mul", "PRelu", "QLinearConv", "QLinearMatMul", "QuantizeLinear", "RMSNormalization", "RNN",
})  # fmt: skip
"""Ops that multiply by their constants, or divide."""
_ADDING = frozenset({"Add", "Mean", "Sub", "Sum"})
_MOVING = frozenset({
    "Cast", "CastLike", "Expand", "Flatten", "Identity", "Neg", "Reshape", "Squeeze", "Tile",
    "Transpose", "Unsqueeze",
})  # fmt: skip


def refuse_nan(model: ir.Model) -> None:
    """Refuse NaN in weights and Constant nodes, but where only it is there and nothing spreads it.

    Raises:
        ModelError: Names the constant, and a node that reads it.
    """
    for value, tensor in _constants(model):
        count = _count(tensor, _nans)
        spoiled = _reader(value, _SCALING | _ADDING) if count else None
        if not count or (count == tensor.size and spoiled is None):
            continue
        reader = spoiled or next((use.node for use in value.uses()), None)
        read = "" if reader is None else f", which {label(reader)!r} reads,"
        raise ModelError(
            f"the {_kind(value)} {value.name!r}{read} holds {count} NaN: the model is damaged; "
            "export it again"
        )


def notes_on_infinity(model: ir.Model) -> tuple[str, ...]:
    """What a user should know of infinity that nodes multiply by, in a sentence."""
    found = []
    for value, tensor in _constants(model):
        reader = _reader(value, _SCALING)
        if reader is not None and (count := _count(tensor, _infinities)):
            found.append(f"the {_kind(value)} {value.name!r} of {label(reader)!r} ({count})")
    if not found:
        return ()
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return (
        f"infinite values in {', '.join(found[:3])}{more}: what is made of them is infinite or "
        "NaN, which 8 bits do not hold; if they are not meant, export the model again",
    )


def _constants(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """Initializers and Constant nodes of floats, those of bodies and functions too."""
    for graph in every_graph(model.graph):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and _has_floats(tensor):
                yield value, tensor
    owners: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for node in itertools.chain.from_iterable(map(every_node, owners)):
        if node.op_type == "Constant" and node.domain == "":
            tensor = _of_constant(node)
            if tensor is not None and _has_floats(tensor):
                yield node.outputs[0], tensor


def _of_constant(node: ir.Node) -> ir.TensorProtocol | None:
    try:
        return ir.convenience.get_const_tensor(node.outputs[0])
    except ValueError:  # a broken one, which others have words for
        return None


def _has_floats(tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype.is_floating_point() and tensor.size > 0


def _reader(value: ir.Value, ops: frozenset[str]) -> ir.Node | None:
    """The first node of these ops that a value, moved about or not, is an operand of."""
    for use in value.uses():
        node = use.node
        if node.op_type in ops:
            return node
        if node.op_type in _MOVING and use.idx == 0:
            found = _reader(node.outputs[0], ops)
            if found is not None:
                return found
    return None


def _kind(value: ir.Value) -> str:
    return "constant" if value.producer() is not None else "weight"


def _count(tensor: ir.TensorProtocol, count: Callable[[NDArray[np.float32]], int]) -> int:
    """What `count` finds in a tensor, whose file is not left mapped."""
    found = count(tensor.numpy())
    if isinstance(tensor, ir.ExternalTensor):
        with contextlib.suppress(BufferError):  # somebody else holds the array
            tensor.release()
    return found


def _nans(array: NDArray[np.float32]) -> int:
    # The minimum carries a NaN on, and needs no array of the size of this one.
    return int(np.isnan(array).sum()) if np.isnan(array.min()) else 0


def _infinities(array: NDArray[np.float32]) -> int:
    ends = np.isinf([array.min(), array.max()])
    return int(np.isinf(array).sum()) if ends.any() else 0
