"""Outline each norm with the residual before it and the Quantize after it as one function.

    x = a + b;  y = LayerNormalization(x, gamma, beta);  q, s = Quantize(y)
        =>   x, y, q, s = AddLayerNorm_K384(a, b, gamma, beta)

with those of the four outputs that are read elsewhere; RMSNorm likewise (see `match_norms`).  Runs
after `fuse_regions`, so that a residual that an epilogue takes, where adding it moves no bytes, is
gone by then, and what is left to absorb is an Add of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qcompiler.ir import dialect
from qcompiler.ir.decisions import decide, inherit, region_of, set_region
from qcompiler.ir.graph import new_initializer, same_shape
from qcompiler.ir.region import Region
from qcompiler.passes.fuse_regions import UNBOUND, drop_unused_functions
from qcompiler.passes.match_norms import Norm, match_norm

__all__ = ["FuseNorms"]


class FuseNorms(ir.passes.InPlacePass):
    """Outline the norms that have a kernel; leave the others to ONNX Runtime.

    Attributes:
        supports: Says why there is no kernel for a region, or None if there is one.
    """

    def __init__(self, supports: Callable[[Region], str | None]) -> None:
        super().__init__()
        self.supports = supports

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Outline every supported norm of the main graph."""
        outlined = 0
        for node in list(model.graph):
            norm = match_norm(node)
            if isinstance(norm, Norm):
                reason = self._outline(model, norm)
                outlined += reason is None
            else:
                reason = norm
            if reason is not None:
                decide(node, "float", reason)
        if outlined:
            model.graph.opset_imports[UNBOUND] = dialect.VERSION
            drop_unused_functions(model)
            common.NameFixPass()(model)
        return ir.passes.PassResult(model, outlined > 0)

    def _outline(self, model: ir.Model, norm: Norm) -> str | None:
        """Replace `norm` and its neighbours; returns why not, if not."""
        add, quantize = _residual(norm), _quantize(norm)
        if reason := self.supports(_region(norm, add, quantize)):
            # The larger region may have no kernel where the norm alone has one.
            add = quantize = None
            if reason := self.supports(_region(norm, add, quantize)):
                return reason
        region = _region(norm, add, quantize)
        function = dialect.region_function(region, UNBOUND, model.graph.opset_imports[""])
        model.functions.setdefault(function.identifier(), function)
        _replace(model.graph, norm, add, quantize, region)
        return None


def _residual(norm: Norm) -> ir.Node | None:
    """The Add of two equal shapes that makes the norm's operand."""
    add = norm.x.producer()
    if add is None or add.op_type != "Add" or add.domain != "":
        return None
    first, second = add.inputs
    assert first is not None and second is not None
    same = same_shape(first, second) and same_shape(first, norm.x)
    return add if same and add.graph is norm.nodes[-1].graph else None


def _quantize(norm: Norm) -> ir.Node | None:
    """The outlined Quantize of the norm's result."""
    for use in norm.result.uses():
        region = region_of(use.node)
        quantizes = isinstance(region, Region) and region.anchor == "Quantize"
        if quantizes and use.node.graph is norm.nodes[-1].graph:
            assert isinstance(region, Region)
            return use.node if region.size("K") == norm.depth else None
    return None


def _is_read(value: ir.Value, inside: list[ir.Node]) -> bool:
    """Whether anything but the nodes of the region reads `value`."""
    return value.is_graph_output() or any(use.node not in inside for use in value.uses())


def _results(norm: Norm, add: ir.Node | None, quantize: ir.Node | None) -> dict[str, ir.Value]:
    """The values that the region must make, by the names of its anchor's outputs."""
    results = {}
    if add is not None and _is_read(norm.x, norm.nodes):
        results["x"] = norm.x
    if quantize is None or _is_read(norm.result, [quantize]):
        results["y"] = norm.result
    if quantize is not None:
        results["q"], results["s"] = quantize.outputs
    return results


def _region(norm: Norm, add: ir.Node | None, quantize: ir.Node | None) -> Region:
    return Region(
        ("Add" if add else "") + norm.op,
        (("K", norm.depth),),
        outputs=tuple(_results(norm, add, quantize)),
        attributes=(("epsilon", norm.epsilon),),
    )


def _replace(
    graph: ir.Graph, norm: Norm, add: ir.Node | None, quantize: ir.Node | None, region: Region
) -> None:
    """Put a call of the region where the first of its nodes stands: all it reads is there."""
    results = list(_results(norm, add, quantize).values())
    operands = [*(add.inputs if add else (norm.x,)), norm.gamma]
    if norm.op == "LayerNorm":
        zeros = np.zeros(norm.depth, np.float32)
        operands.append(norm.beta or new_initializer(graph, f"{norm.gamma.name}_zeros", zeros))
    new = ir.node(
        region.name,
        operands,
        domain=UNBOUND,
        version=dialect.VERSION,
        num_outputs=len(results),
    )
    inherit(new, norm.nodes[-1])
    set_region(new, region)
    fused = [*(["a residual"] if add else []), *(["Quantize"] if quantize else [])]
    decide(new, "body", f"fused with {' and '.join(fused)}" if fused else "outlined")
    old = [*([add] if add else []), *norm.nodes, *([quantize] if quantize else [])]
    ir.convenience.replace_nodes_and_values(graph, old[0], old, [new], results, list(new.outputs))
    dialect.type_results(new, region.anchor, region.outputs)
