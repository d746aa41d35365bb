"""Take over weights that GPTQ or AWQ rounded elsewhere, from the safetensors file of a checkpoint.

    MatMul(x, W)   =>   MatMul(x, DQ(W_q, s, z))               blocks along K
    MatMul(x, W)   =>   MatMul(Gather(x, order), DQ(W_q, …))   where act-order mixed the groups

The integers, scales and zero points are the checkpoint's, in ONNX layout and two's complement; for
how they are packed see `checkpoint_layers`.  AWQ scaled what is before its layers as well: of such
a checkpoint floats are taken over too (`checkpoint_floats`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.checkpoint_floats import take_over_floats
from qcompiler.checkpoint_layers import CheckpointLayer, method_of, unpack_layer
from qcompiler.checkpoint_names import plain_name, products_called, products_of, weight_names
from qcompiler.ir.decisions import decide
from qcompiler.ir.errors import ModelError, OptionError, did_you_mean
from qcompiler.ir.graph import drop_if_unread, label, new_initializer
from qcompiler.ir.types import PerGroup, QuantType
from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.rounded_weight import RoundedWeight, place_dequantize
from qcompiler.safetensors import SafeTensors

__all__ = ["take_over_weights"]


def take_over_weights(
    model: ir.Model,
    checkpoint: str | os.PathLike[str],
    names: Mapping[str, str] | None = None,
    *,
    zeros_less_one: bool | None = None,
) -> list[str]:
    """Put the rounded weights of a checkpoint in the place of the model's float ones.

    Args:
        model: The float model, changed in place.
        checkpoint: A `.safetensors` file, or the folder of a checkpoint.
        names: By the checkpoint's name of a layer, the name of its MatMul or of its weight, where
            they do not end alike.
        zeros_less_one: Whether GPTQ's zero points are stored less one; by default as the folder's
            configuration says: they are not in the format "gptq_v2".

    Returns:
        The layers that were found, all that the checkpoint has.

    Raises:
        ModelError: The file cannot be read, or a layer has no counterpart of its shape, or that of
            another layer.
        OptionError: `zeros_less_one` of a checkpoint of AWQ, where it means nothing.
    """
    file = SafeTensors(checkpoint)
    given = names or {}
    layers = _layers_of(file, given)
    less_one = _is_less_one(Path(checkpoint)) if zeros_less_one is None else zeros_less_one
    FixNames()(model)
    weights = weight_names(model)
    Canonicalize()(model)
    products = products_of(model, weights)
    methods = set()
    orders: dict[tuple[ir.Value, bytes], ir.Value] = {}
    for layer, node in _nodes_of(layers, given, products, file.name).items():
        methods.add(_take_over(model.graph, node, file, layer, less_one, orders))
    if methods == {"awq"} and zeros_less_one is not None:
        raise OptionError(
            f"zeros_less_one={zeros_less_one} (--zeros): {file.name} is of AWQ, whose zero points "
            "are plain"
        )
    if "awq" in methods:
        take_over_floats(model, file, layers, products)
    FixNames()(model)
    return layers


def _layers_of(file: SafeTensors, names: Mapping[str, str]) -> list[str]:
    """The rounded layers of a checkpoint; `names` must be about some of them."""
    layers = [name.removesuffix(".qweight") for name in file if name.endswith(".qweight")]
    if not layers:
        raise ModelError(f"{file.name} holds no qweight: it is no checkpoint of GPTQ or AWQ")
    for layer in names:
        if layer not in layers:
            hint = did_you_mean(layer, layers) or f"; the first is {layers[0]!r}"
            raise ModelError(f"{file.name} has no layer {layer!r}{hint}")
    return layers


def _nodes_of(
    layers: Iterable[str], names: Mapping[str, str], products: Mapping[str, ir.Node], file: str
) -> dict[str, ir.Node]:
    """A product that each layer is; others may share its weight."""
    taken, found = dict[ir.Value | None, str](), dict[str, ir.Node]()
    for layer in layers:
        node = found[layer] = _find(layer, names.get(layer), products, file)
        other = taken.setdefault(node.inputs[1], layer)
        if other != layer:
            raise ModelError(
                f"{file}: layers {other!r} and {layer!r} would both be {label(node)}; "
                f"{_say_which(layer)}"
            )
    return found


def _take_over(
    graph: ir.Graph,
    node: ir.Node,
    file: SafeTensors,
    layer: str,
    less_one: bool,
    orders: dict[tuple[ir.Value, bytes], ir.Value],
) -> str:
    """Take one layer over for all products of a weight; the method that rounded it."""
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    k, n = weight.const_value.shape.numpy()
    method = method_of(file, layer, k, n)
    unpacked = unpack_layer(file, layer, method, (k, n), less_one)
    for reader in _replace(graph, weight, unpacked, orders):
        decide(reader, "qdq", f"weights of {method} as {Path(file.name).name} has them")
    return method


def _is_less_one(path: Path) -> bool:
    folder = path if path.is_dir() else path.parent
    for name in ("quantize_config.json", "config.json"):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        config = content.get("quantization_config", content) if isinstance(content, dict) else None
        if isinstance(config, dict) and config.get("checkpoint_format") is not None:
            return bool(config["checkpoint_format"] != "gptq_v2")
    return True


def _find(layer: str, given: str | None, products: Mapping[str, ir.Node], file: str) -> ir.Node:
    wanted = given or layer
    found = products_called(wanted, products)
    if len(found) == 1:
        return found[0]
    problem = "several" if found else "no"
    raise ModelError(
        f"{file}: {problem} MatMul of the model {'have' if found else 'has'} the name of layer "
        f"{layer!r}{did_you_mean(plain_name(wanted), products)}; {_say_which(layer)}"
    )


def _say_which(layer: str) -> str:
    return f"say which is meant with --name {layer}=NODE (names={{{layer!r}: …}})"


def _replace(graph: ir.Graph, weight: ir.Value, layer: CheckpointLayer,
             orders: dict[tuple[ir.Value, bytes], ir.Value]) -> list[ir.Node]:  # fmt: skip
    """Let the products of a weight read it rounded, and activations in the order of its groups."""
    nodes = [node for node, index in weight.uses() if node.op_type == "MatMul" and index == 1]
    order, count = np.argsort(layer.groups, kind="stable"), len(layer.codes)
    group = int(np.bincount(layer.groups).max())  # the last one may be shorter
    even = np.array_equal(layer.groups[order], np.arange(count) // group)
    if not even or -(-count // group) != len(layer.scales):
        raise ModelError(
            f"{label(nodes[0])}: {len(layer.scales)} groups of {count} inputs, not all alike"
        )
    if not np.array_equal(order, np.arange(count)):
        for node in nodes:
            node.replace_input_with(0, _ordered(graph, node, order, orders))
    type, rounded = _rounded(layer, order, group, weight.dtype or ir.DataType.FLOAT)
    floats = place_dequantize(graph, weight, type, rounded).outputs[0]
    for node in nodes:
        node.replace_input_with(1, floats)
    drop_if_unread(weight)
    return nodes


def _rounded(
    layer: CheckpointLayer, order: NDArray[np.int64], group: int, expressed: ir.DataType
) -> tuple[QuantType, RoundedWeight]:
    """The weight in two's complement, with scales of the type of the model's own."""
    storage = ir.DataType.INT8 if layer.bits == 8 else ir.DataType.INT4
    middle, integers = 2 ** (layer.bits - 1), storage.numpy()
    zeros = layer.zeros - middle
    type = QuantType(storage, expressed, PerGroup(0, group), symmetric=not zeros.any())
    rounded = RoundedWeight(
        np.ascontiguousarray(layer.codes[order] - middle).astype(integers),
        layer.scales.astype(expressed.numpy()),
        zeros.astype(integers) if zeros.any() else None,
    )
    return type, rounded


def _ordered(graph: ir.Graph, node: ir.Node, order: NDArray[np.int64],
             orders: dict[tuple[ir.Value, bytes], ir.Value]) -> ir.Value:  # fmt: skip
    """The activations of a product in another order; products that share it share a Gather."""
    data = node.inputs[0]
    assert data is not None and node.graph is not None
    key = (data, order.tobytes())
    if key not in orders:
        indices = new_initializer(graph, f"{data.name}_order", order)
        gather = ir.node("Gather", [data, indices], {"axis": -1}, name=f"{data.name}_reorder")
        value = gather.outputs[0]
        value.name, value.type, value.shape = f"{data.name}_ordered", data.type, data.shape
        node.graph.insert_before(node, gather)
        orders[key] = value
    return orders[key]
