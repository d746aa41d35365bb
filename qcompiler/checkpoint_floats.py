"""The floats of a checkpoint of AWQ, which are not those of the model that it was made from.

Factors of the inputs of a layer were taken out of what is before it: a norm, a bias, a matrix.  All
that reads that has them in its weight, rounded or not: the router of experts stays float, and reads
what the experts read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.checkpoint_names import plain_name, products_called
from qcompiler.ir.errors import ModelError, did_you_mean
from qcompiler.ir.graph import constant, drop_if_unread, new_initializer
from qcompiler.safetensors import SafeTensors

__all__ = ["take_over_floats"]


def take_over_floats(
    model: ir.Model,
    file: SafeTensors,
    layers: Collection[str],
    products: Mapping[str, ir.Node],
) -> None:
    """Take over norms and biases, and the weights of products that were not rounded.

    Args:
        model: Changed in place.
        file: The checkpoint.
        layers: Those that were rounded.
        products: The model's MatMuls by constant matrices, by name.

    Raises:
        ModelError: A norm or bias is no constant of the model, a shape is another, or an activation
            is scaled.
    """
    known = {plain_name(name): value for name, value in model.graph.initializers.items()}
    for name in file:
        layer, _, part = name.rpartition(".")
        if part == "scales" and layer not in layers:
            raise ModelError(
                f"{file.name}: {name!r} divides an activation, which the float model does not do; "
                "only checkpoints whose factors are in norms and weights are taken over"
            )
        if part not in ("weight", "bias"):
            continue
        dimensions = len(file.shape(name))
        if dimensions == 1:
            _take_over_vector(known, file, name)
        elif dimensions == 2 and part == "weight":
            _take_over_matrix(model.graph, products_called(layer, products), file, name)


def _take_over_vector(known: Mapping[str, ir.Value], file: SafeTensors, name: str) -> None:
    wanted = plain_name(name)
    ends = [v for n, v in known.items() if n == wanted or n.endswith(f".{wanted}")]
    if len(ends) != 1 or ends[0].const_value is None:
        raise ModelError(
            f"{file.name}: {name!r} is no constant of the model{did_you_mean(wanted, known)}; "
            "AWQ scales norms, so that each must be found"
        )
    value, old = ends[0], ends[0].const_value
    tensor = _of_shape(file, name, tuple(old.shape.numpy()))
    value.const_value = ir.Tensor(tensor.astype(old.dtype.numpy()), name=value.name)


def _take_over_matrix(graph: ir.Graph, nodes: list[ir.Node], file: SafeTensors, name: str) -> None:
    """Of a product; what is looked up, as an embedding is, is never scaled."""
    weight = nodes[0].inputs[1] if len(nodes) == 1 else None
    old = constant(weight)
    if weight is None or old is None:
        return
    tensor = _of_shape(file, name, old.shape[::-1]).T.astype(old.dtype)
    if np.array_equal(tensor, old):
        return
    new = new_initializer(graph, f"{weight.name}_of_checkpoint", tensor)
    for node, index in list(weight.uses()):
        if node.op_type == "MatMul" and index == 1:
            node.replace_input_with(1, new)
    drop_if_unread(weight)


def _of_shape(file: SafeTensors, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    if file.shape(name) != shape:
        raise ModelError(
            f"{file.name}: {name!r} is {list(file.shape(name))}, in the model {list(shape)}"
        )
    return file[name]
