"""Fold a BatchNormalization into the convolution before it.

    BatchNormalization(Conv(x, W, b), gamma, beta, mu, var)   =>   Conv(x, W', b')
        f = gamma / sqrt(var + eps),  W' = W f,  b' = (b - mu) f + beta

and ConvTranspose likewise; factors and offsets of channels too, see `fuse_affine`.
Left alone, the normalization would stay in float between two integer convolutions.  (onnxscript has
rules for this; 0.7 folds training mode too, and loses weights that are graph outputs.)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qcompiler.ir.graph import constant, every_node, new_initializer, only_consumer, replace_nodes
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.fuse_affine import channel_axis, try_fold_affine

__all__ = ["FuseBatchNorm"]

_INPUTS = 5


class FuseBatchNorm(ir.passes.InPlacePass):
    """Fold every BatchNormalization in inference mode whose Conv is read by nothing else."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold in place; the Conv keeps its name."""
        folded = 0
        while found := [node for node in every_node(model.graph) if _try(model.graph, node)]:
            folded += len(found)
        if folded:
            common.RemoveUnusedNodesPass()(model)
            FixNames()(model)
        return ir.passes.PassResult(model, folded > 0)


def _try(graph: ir.Graph, conv: ir.Node) -> bool:
    return _try_fold(graph, conv) or try_fold_affine(graph, conv)


def _try_fold(graph: ir.Graph, conv: ir.Node) -> bool:
    axis = channel_axis(conv)
    if axis is None:
        return False
    norm = only_consumer(conv.outputs[0])
    if norm is None or norm.op_type != "BatchNormalization" or norm.graph is not conv.graph:
        return False
    training = norm.attributes.get_int("training_mode", 0)
    extra = any(value.uses() or value.is_graph_output() for value in norm.outputs[1:])
    if training or extra or len(norm.inputs) != _INPUTS:
        return False
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    weight, *parameters = (constant(value) for value in [conv.inputs[1], *norm.inputs[1:]])
    offset = np.zeros((), np.float32) if bias is None else constant(bias)
    if weight is None or offset is None or any(array is None for array in parameters):
        return False
    gamma, beta, mean, variance = (np.asarray(array, np.float64) for array in parameters)
    factor = gamma / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
    scaled = weight * np.expand_dims(factor, tuple(i for i in range(weight.ndim) if i != axis))
    shifted = (np.asarray(offset, np.float64) - mean) * factor + beta
    operands = [
        conv.inputs[0],
        new_initializer(graph, f"{conv.name}_weight", scaled.astype(weight.dtype)),
        new_initializer(graph, f"{conv.name}_bias", shifted.astype(weight.dtype)),
    ]
    new = ir.node(conv.op_type, operands, conv.attributes, name=conv.name)
    replace_nodes([conv, norm], [new])
    return True
