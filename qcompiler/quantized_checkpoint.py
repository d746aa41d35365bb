"""Take over weights that GPTQ or AWQ rounded elsewhere, from the safetensors file of a checkpoint.

    MatMul(x, W)   =>   MatMul(x, DQ(W_q, s, z))               blocks along K
    MatMul(x, W)   =>   MatMul(Gather(x, order), DQ(W_q, …))   where act-order mixed the groups

The integers, scales and zero points are the checkpoint's, in ONNX layout and two's complement:

          qweight                      qzeros                          g_idx
    GPTQ  int32 [K b / 32, N]          int32 [G, N b / 32], less one   group of each input
    AWQ   int32 [K, N b / 32]          int32 [G, N b / 32]

where the nibbles of AWQ's words hold the columns 0 2 4 6 1 3 5 7 of eight.  The first values are in
the lowest bits.  AWQ scaled the norms before its layers as well: floats of one dimension are taken
over from such a checkpoint too.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir.decisions import decide
from qcompiler.ir.errors import ModelError, OptionError, did_you_mean
from qcompiler.ir.graph import constant, drop_if_unread, label, new_initializer
from qcompiler.ir.types import PerGroup, QuantType
from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.node_rules import names_of
from qcompiler.passes.rounded_weight import RoundedWeight, place_dequantize
from qcompiler.safetensors import SafeTensors

__all__ = ["take_over_weights"]

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which column of eight the nibbles of a word hold, the lowest first."""


@dataclasses.dataclass(frozen=True)
class _Layer:
    """One layer of a checkpoint, unpacked.

    Attributes:
        codes: [K, N], unsigned.
        zeros: [G, N], unsigned.
        scales: [G, N].
        groups: The group of each input, [K].
        bits: Of a code.
    """

    codes: NDArray[np.int16]
    zeros: NDArray[np.int16]
    scales: NDArray[np.float32]
    groups: NDArray[np.int64]
    bits: int


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
    layers = [name.removesuffix(".qweight") for name in file if name.endswith(".qweight")]
    if not layers:
        raise ModelError(f"{file.name} holds no qweight: it is no checkpoint of GPTQ or AWQ")
    for layer in names or {}:
        if layer not in layers:
            hint = did_you_mean(layer, layers) or f"; the first is {layers[0]!r}"
            raise ModelError(f"{file.name} has no layer {layer!r}{hint}")
    less_one = _is_less_one(Path(checkpoint)) if zeros_less_one is None else zeros_less_one
    Canonicalize()(model)
    products = _products(model)
    orders: dict[tuple[ir.Value, bytes], ir.Value] = {}
    taken: dict[ir.Node, str] = {}
    methods = set()
    for layer in layers:
        node = _find(layer, (names or {}).get(layer), products, file.name)
        if node in taken:
            raise ModelError(
                f"{file.name}: layers {taken[node]!r} and {layer!r} would both be {label(node)}; "
                f"{_say_which(layer)}"
            )
        weight = node.inputs[1]
        assert weight is not None and weight.const_value is not None
        k, n = weight.const_value.shape.numpy()
        method = _method(file, layer, k, n)
        methods.add(method)
        unpacked = _unpack(file, layer, method, (k, n), less_one)
        for reader in _replace(model.graph, weight, unpacked, orders):
            taken[reader] = layer
            decide(reader, "qdq", f"weights of {method} as {Path(file.name).name} has them")
    if methods == {"awq"} and zeros_less_one is not None:
        raise OptionError(
            f"zeros_less_one={zeros_less_one} (--zeros): {file.name} is of AWQ, whose zero points "
            "are plain"
        )
    if "awq" in methods:
        _take_over_floats(model, file)
    FixNames()(model)
    return layers


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


def _products(model: ir.Model) -> dict[str, ir.Node]:
    """MatMuls by constant matrices, by every name that they go by."""
    found: dict[str, ir.Node] = {}
    for node in model.graph.all_nodes():
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        array = constant(weight)
        if weight is not None and array is not None and array.ndim == 2:
            for name in (*names_of(node), weight.name or ""):
                found.setdefault(_plain(name), node)
    return found


def _plain(name: str) -> str:
    """Without what exporters put around the name of a module."""
    name = name.replace("/", ".").strip(".")
    for ending in (".weight", ".MatMul"):
        name = name.removesuffix(ending)
    return name


def _find(layer: str, given: str | None, products: Mapping[str, ir.Node], file: str) -> ir.Node:
    wanted = _plain(given or layer)
    if wanted in products:
        return products[wanted]
    ends = {
        id(node): node
        for name, node in products.items()
        if name and (name.endswith(f".{wanted}") or wanted.endswith(f".{name}"))
    }
    if len(ends) == 1:
        return next(iter(ends.values()))
    problem = "several" if ends else "no"
    raise ModelError(
        f"{file}: {problem} MatMul of the model {'have' if ends else 'has'} the name of layer "
        f"{layer!r}{did_you_mean(wanted, products)}; {_say_which(layer)}"
    )


def _say_which(layer: str) -> str:
    return f"say which is meant with --name {layer}=NODE (names={{{layer!r}: …}})"


def _method(file: SafeTensors, layer: str, k: int, n: int) -> Literal["gptq", "awq"]:
    """Along which axis it is packed."""
    packed = file[f"{layer}.qweight"]
    if packed.dtype == np.int32 and packed.ndim == 2:
        rows, columns = packed.shape
        if columns == n and rows < k:
            return "gptq"
        if rows == k and columns < n:
            return "awq"
    raise ModelError(
        f"{file.name}: {layer}.qweight is {packed.dtype} {list(packed.shape)}, which is no packed "
        f"form of the model's [{k}, {n}]"
    )


def _unpack(file: SafeTensors, layer: str, method: str, shape: tuple[int, int],
            less_one: bool) -> _Layer:  # fmt: skip
    k, n = shape
    missing = [part for part in ("qzeros", "scales") if f"{layer}.{part}" not in file]
    if missing:
        raise ModelError(f"{file.name} has no {layer}.{missing[0]} beside its qweight")
    packed, zeros = file[f"{layer}.qweight"], file[f"{layer}.qzeros"]
    scales = file[f"{layer}.scales"].astype(np.float32)
    if zeros.dtype != np.int32 or zeros.ndim != 2 or scales.ndim != 2 or not scales.size:
        raise ModelError(f"{file.name}: qzeros and scales of {layer} are no packed tables")
    if not np.isfinite(scales).all():
        raise ModelError(f"{file.name}: scales of {layer} hold NaN or Inf")
    bits = packed.size * 32 // (k * n)
    if bits not in (2, 3, 4, 8) or packed.size * 32 != bits * k * n:
        raise ModelError(f"{file.name}: {layer} has {packed.size * 32 / (k * n):.3g} bits a weight")
    if method == "gptq":
        codes = _bits_along_rows(np.ascontiguousarray(packed.T), bits).T
        points = _bits_along_rows(zeros, bits)[:, :n]
        points = (points + less_one) & (2**bits - 1)
    else:
        codes, points = (_awq_columns(table, bits) for table in (packed, zeros))
    group = -(-k // len(scales))
    indices = f"{layer}.g_idx"
    groups = file[indices].astype(np.int64) if indices in file else np.arange(k) // group
    if scales.shape != points.shape or groups.shape != (k,) or groups.max() >= len(scales):
        raise ModelError(f"{file.name}: scales, qzeros and g_idx of {layer} do not fit each other")
    return _Layer(codes, points, scales, groups, bits)


def _bits_along_rows(words: NDArray[np.int32], bits: int) -> NDArray[np.int16]:
    """Numbers of a stream of bits per row, the lowest bits first; 3 bits may lie in two words."""
    rows = len(words)
    octets = np.ascontiguousarray(words, "<i4").view(np.uint8).reshape(rows, -1)
    stream = np.unpackbits(octets, axis=1, bitorder="little")
    digits = stream[:, : stream.shape[1] // bits * bits].reshape(rows, -1, bits)
    return np.asarray(digits @ (1 << np.arange(bits)), np.int16)


def _awq_columns(words: NDArray[np.int32], bits: int) -> NDArray[np.int16]:
    if bits != 4:
        raise ModelError(f"weights of AWQ have 4 bits, not {bits}")
    nibbles = _bits_along_rows(words, bits).reshape(len(words), -1, 8)
    columns = np.empty_like(nibbles)
    columns[..., list(_AWQ_ORDER)] = nibbles
    return columns.reshape(len(words), -1)


def _replace(graph: ir.Graph, weight: ir.Value, layer: _Layer,
             orders: dict[tuple[ir.Value, bytes], ir.Value]) -> list[ir.Node]:  # fmt: skip
    """Let the products of a weight read it rounded, and activations in the order of its groups."""
    nodes = [node for node, index in weight.uses() if node.op_type == "MatMul" and index == 1]
    order, count = np.argsort(layer.groups, kind="stable"), len(layer.codes)
    group = -(-count // len(layer.scales))
    if not np.array_equal(layer.groups[order], np.arange(count) // group):
        raise ModelError(f"{label(nodes[0])}: its groups are not all of {group} inputs")
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
    layer: _Layer, order: NDArray[np.int64], group: int, expressed: ir.DataType
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


def _take_over_floats(model: ir.Model, file: SafeTensors) -> None:
    """Norms and biases, which AWQ may have scaled."""
    known = {_plain(name): value for name, value in model.graph.initializers.items()}
    for name in file:
        tensor = file[name] if name.endswith((".weight", ".bias")) else None
        if tensor is None or tensor.ndim != 1:
            continue
        wanted = _plain(name)
        ends = [v for n, v in known.items() if n == wanted or n.endswith(f".{wanted}")]
        if len(ends) != 1 or ends[0].const_value is None:
            raise ModelError(
                f"{file.name}: {name!r} is no constant of the model{did_you_mean(wanted, known)}; "
                "AWQ scales norms, so that each must be found"
            )
        value, old = ends[0], ends[0].const_value
        if tuple(old.shape.numpy()) != tensor.shape:
            raise ModelError(
                f"{file.name}: {name!r} is {list(tensor.shape)}, in the model {old.shape}"
            )
        value.const_value = ir.Tensor(tensor.astype(old.dtype.numpy()), name=value.name)
