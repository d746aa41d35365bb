"""Let a product quantize its own result.

    q', s' = Quantize_K1536(QMatMulW8A8_K384_N1536_AddC_Gelu(q, s, w, ws, b))
        =>  q', s' = RequantizedQMatMulW8A8_K384_N1536_AddC_Gelu_yqys(q, s, w, ws, b)

Each thread quantizes rows whose floats are still in a core's cache, and a quarter of the bytes
reaches memory: what is wide, between the two products of an MLP, is the largest there is.  What is
quantized may be the result times one factor per channel (see `smooth_activations`, and the masks of
`split_outliers`); if others read the result it is stored, too.

Products by int4 weights do so, too: RequantizedQMatMulW4A8 and RequantizedQMatMulW4S8A8.

Runs after `merge_siblings`, and after `fuse_windows`, whose products quantize their input and not
their result; before `fuse_quantize`, which would have the next product do it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.ir import dialect
from qcompiler.ir.decisions import decide, decision_of, inherit, region_of, set_region
from qcompiler.ir.graph import constant, only_consumer
from qcompiler.ir.joined_regions import requantized, requantized_parts, requantizes
from qcompiler.ir.region import Region
from qcompiler.passes.outlining import UNBOUND, JoiningPass, outline

__all__ = ["FuseRequantize", "quantizing_readers", "separate_results"]

_PRODUCTS = ("QMatMulW8A8", "QMatMulW4A8", "QMatMulW4S8A8")

_RESULT = "qcompiler.result"
"""The name of the floats that a node quantizes, which its own results do not say."""


class FuseRequantize(JoiningPass):
    """Join each outlined product with the one outlined Quantize of its result."""

    def join(self, model: ir.Model, product: ir.Node) -> bool:
        """Join a product with the Quantize of its result."""
        region = region_of(product) if product.domain == UNBOUND else None
        if region is None or region.anchor not in _PRODUCTS or region.widths or region.flags:
            return False
        result = product.outputs[0]
        readers = quantizing_readers(result)
        if not readers:
            return False
        factor = _factor(readers[0], result)
        nodes = [product, *readers]
        is_read = result.is_graph_output() or len({use.node for use in result.uses()}) > 1
        whole = _whole(region, is_stored=is_read, is_smoothed=factor is not None)
        if self.refusal(whole, nodes) is not None:
            return False
        operands = [*product.inputs, *([] if factor is None else [factor])]
        new = outline(model, whole, operands, like=product)
        decide(new, "body", f"{decision_of(product).why}; quantizes its result")
        new.metadata_props[_RESULT] = result.name or ""
        self.put(new, nodes, [*([result] if is_read else []), *readers[-1].outputs])
        return True


def _whole(region: Region, *, is_stored: bool, is_smoothed: bool) -> Region:
    return dataclasses.replace(
        region,
        anchor=requantized(region.anchor),
        extras=(*region.extras, "channel") if is_smoothed else region.extras,
        outputs=("y", "yq", "ys") if is_stored else ("yq", "ys"),
        flags=("smoothed",) if is_smoothed else (),
    )


def separate_results(model: ir.Model) -> None:
    """Take apart again what quantizes its own result, so that this is there to be looked at."""
    for node in list(model.graph):
        region = region_of(node)
        if region is not None and requantizes(region):
            _separate(model, node, *requantized_parts(region))


def _separate(model: ir.Model, node: ir.Node, quantize: Region, product: Region) -> None:
    operands = list(node.inputs)
    factors = [operands.pop() for _ in quantize.extras]
    first = _call(model, product, operands, node)
    inherit(first, node)
    set_region(first, product)
    (result,) = first.outputs
    second = _call(model, quantize, [result, *factors], node)
    *stored, q, s = node.outputs
    result.name, result.shape = node.metadata_props.pop(_RESULT, None), q.shape
    made = [*([result] if stored else []), *second.outputs]
    graph = node.graph
    assert graph is not None
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], [first, second], [*stored, q, s], made
    )


def _call(
    model: ir.Model, region: Region, operands: Sequence[ir.Value | None], like: ir.Node
) -> ir.Node:
    """A call of a region's function, which the model then has, in the domain of another's."""
    function = dialect.region_function(region, like.domain, model.graph.opset_imports[""])
    model.functions[function.identifier()] = function
    new = ir.node(
        region.name, operands, domain=like.domain, version=dialect.VERSION,
        num_outputs=len(function.outputs),
    )  # fmt: skip
    set_region(new, region)
    for value, name in zip(new.outputs, dialect.OPS[region.anchor].outputs, strict=True):
        value.dtype = dialect.result_type(region, name)
    return new


def quantizing_readers(result: ir.Value) -> list[ir.Node]:
    """The outlined Quantize of a value, or a Mul by channel and the one that alone reads that."""
    for use in result.uses():
        if _quantizes(use.node, result):
            return [use.node]
    for use in result.uses():
        smoothed = _factor(use.node, result) is not None
        reader = only_consumer(use.node.outputs[0]) if smoothed else None
        if reader is not None and _quantizes(reader, result):
            return [use.node, reader]
    return []


def _quantizes(node: ir.Node, result: ir.Value) -> bool:
    if node.domain != UNBOUND or node.graph is not result.graph:
        return False
    region = region_of(node)
    return region is not None and region.anchor == "Quantize" and not region.flags


def _factor(node: ir.Node, result: ir.Value) -> ir.Value | None:
    """The constant of one float per channel that `node` multiplies `result` by."""
    if node.op_type != "Mul" or node.domain != "" or node.graph is not result.graph:
        return None
    factor = next((value for value in node.inputs if value is not result), None)
    array = constant(factor)
    if array is None or array.dtype != np.float32 or result.shape is None:
        return None
    return factor if array.shape == tuple(result.shape[-1:]) else None
