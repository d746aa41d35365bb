"""Sparse tensors of ONNX, of which `onnx_ir` knows nothing: made dense before it reads a model."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import onnx

__all__ = ["densify"]

_LARGEST = 1 << 31
"""Bytes that protobuf could hold of a dense tensor."""


def densify(model: onnx.ModelProto) -> None:
    """Put dense tensors in the place of sparse ones, in place: initializers and Constant nodes.

    Raises:
        ValueError: Indices outside the tensor, or more than 2 GiB when dense.
    """
    _densify_graph(model.graph)
    for function in model.functions:
        _densify_nodes(function.node)


def _densify_graph(graph: onnx.GraphProto) -> None:
    for sparse in graph.sparse_initializer:
        graph.initializer.append(_dense(sparse))
    del graph.sparse_initializer[:]
    _densify_nodes(graph.node)


def _densify_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _densify_graph(attribute.g)
            elif attribute.type == onnx.AttributeProto.SPARSE_TENSOR:
                dense = _dense(attribute.sparse_tensor)
                attribute.CopyFrom(onnx.helper.make_attribute("value", dense))


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    """Indices are either flat, or one row of coordinates for each value."""
    name = sparse.values.name
    values = onnx.numpy_helper.to_array(sparse.values)
    indices = onnx.numpy_helper.to_array(sparse.indices)
    size = math.prod(sparse.dims)
    if min(sparse.dims, default=0) < 0 or size * values.itemsize > _LARGEST:
        raise ValueError(f"sparse tensor {name!r} of shape {list(sparse.dims)} is too large")
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 2:
        indices = np.ravel_multi_index(tuple(indices.T), dense.shape)
    if indices.size and indices.min() < 0:
        raise ValueError(f"sparse tensor {name!r} has a negative index")
    dense.reshape(-1)[indices] = values
    return onnx.numpy_helper.from_array(dense, name)
