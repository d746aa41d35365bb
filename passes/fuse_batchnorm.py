"""Fold a BatchNormalization into the convolution before it.

    BatchNormalization(Conv(x, W, b), gamma, beta, mu, var)   =>   Conv(x, W', b')
        W' = W gamma / sqrt(var + eps),  b' = (b - mu) gamma / sqrt(var + eps) + beta

Also for ConvTranspose and Gemm; the rules are onnxscript's.  Left alone, the normalization would
stay in float between two integer convolutions.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules.common import (
    fuse_batchnorm_into_conv_rule,
    fuse_batchnorm_into_conv_transpose_rule,
    fuse_batchnorm_into_gemm_rule,
)

__all__ = ["FuseBatchNorm"]

_RULES = [
    fuse_batchnorm_into_conv_rule,
    fuse_batchnorm_into_conv_transpose_rule,
    fuse_batchnorm_into_gemm_rule,
]


class FuseBatchNorm(ir.passes.InPlacePass):
    """Fold every BatchNormalization whose producer is read by nothing else."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold in place; what a BatchNormalization was folded into keeps its own name."""
        producers = {
            node.outputs[0].name: node.inputs[0].producer()
            for node in model.graph.all_nodes()
            if node.op_type == "BatchNormalization" and node.inputs[0] is not None
        }
        names = {value: node.name for value, node in producers.items() if node is not None}
        result = RewritePass(_RULES)(model)
        for node in model.graph.all_nodes():
            if node.op_type != "BatchNormalization" and node.outputs[0].name in names:
                node.name = names[node.outputs[0].name]
        return ir.passes.PassResult(model, result.modified)
