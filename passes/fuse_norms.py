"""Outline each norm with the residual before it and the Quantize after it as one function.

    x = a + b;  y = LayerNormalization(x, gamma, beta);  q, s = Quantize(y)
        =>   x, y, q, s = AddLayerNorm_K384(a, b, gamma, beta)

with those of the four outputs that are read elsewhere; RMSNorm likewise (see `match_norms`).  What
is quantized may be y times one factor per channel (see `smooth_activations`).  A norm in float16 is
a region in float16, and so is one in float32 between Casts from it and to it (`half_norms`):

    y = Cast <to = FLOAT16> (RMSNorm(Cast <to = FLOAT> (x), gamma))
        =>   y = RMSNorm_K576_f16(x, gamma)

Runs after
`fuse_regions`, so that a residual that an epilogue takes, where adding it moves no bytes, is gone
by then, and what is left to absorb is an Add of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.ir.decisions import decide, region_of
from qcompiler.ir.graph import (
    constant,
    drop_if_unread,
    new_initializer,
    only_consumer,
    same_shape,
)
from qcompiler.ir.region import HALF, Region
from qcompiler.passes.half_norms import between_casts
from qcompiler.passes.match_norms import Norm, match_norm
from qcompiler.passes.outlining import RegionPass, outline

__all__ = ["FuseNorms"]


class FuseNorms(RegionPass):
    """Outline the norms that have a kernel; leave the others to ONNX Runtime."""

    def outline_all(self, model: ir.Model) -> bool:
        """Outline every supported norm of the main graph."""
        outlined, read = 0, set[ir.Value]()
        for node in list(model.graph):
            norm = match_norm(node)
            if isinstance(norm, Norm):
                reason = self._outline(model, between_casts(norm) or norm, read)
                outlined += reason is None
            else:
                reason = norm
            if reason is not None:
                decide(node, "float", reason)
        # An exponent, an epsilon: ONNX Runtime warns of each that nobody reads.  Asked at the end:
        # of what all norms share it takes as long as there are norms.
        for value in read:
            drop_if_unread(value)
        return outlined > 0

    def _outline(self, model: ir.Model, norm: Norm, read: set[ir.Value]) -> str | None:
        """Replace `norm` and its neighbours; returns why not, if not; adds what they read."""
        found = _Found(norm, _residual(norm), *_quantize(norm))
        if self.refusal(_region(found), found.nodes, found.reads):
            # The larger region may have no kernel where the norm alone has one.
            found = _Found(norm)
            if reason := self.refusal(_region(found), found.nodes, found.reads):
                return reason
        read.update(value for node in found.nodes for value in node.inputs if value is not None)
        new, results = _outlined(model, found), list(found.results.values())
        self.put(new, found.nodes, results, found.reads)
        return None


@dataclasses.dataclass(frozen=True)
class _Found:
    """A norm and the neighbours that its region takes in."""

    norm: Norm
    add: ir.Node | None = None
    quantize: ir.Node | None = None
    smooth: ir.Node | None = None
    """The Mul between the norm and `quantize`."""

    @property
    def results(self) -> dict[str, ir.Value]:
        """The values that the region must make, by the names of its anchor's outputs."""
        results = {}
        if self.add is not None and _is_read(self.norm.x, self.norm.nodes):
            results["x"] = self.norm.x
        reader = self.smooth or self.quantize
        if reader is None or _is_read(self.norm.result, [reader]):
            results["y"] = self.norm.result
        if self.quantize is not None:
            results["q"], results["s"] = self.quantize.outputs
        return results

    @property
    def reads(self) -> list[ir.Value | None]:
        """What is no constant; not a Cast that others read too, but what that reads."""
        return [*self.add.inputs] if self.add is not None else [self.norm.x]

    @property
    def nodes(self) -> list[ir.Node]:
        """All of them, in order."""
        after = [node for node in (self.smooth, self.quantize) if node is not None]
        return [*([self.add] if self.add else []), *self.norm.nodes, *after]


def _residual(norm: Norm) -> ir.Node | None:
    """The Add of two equal shapes that makes the norm's operand."""
    add = norm.x.producer()
    if add is None or add.op_type != "Add" or add.domain != "":
        return None
    first, second = add.inputs
    assert first is not None and second is not None
    same = same_shape(first, second) and same_shape(first, norm.x)
    return add if same and add.graph is norm.nodes[-1].graph else None


def _quantize(norm: Norm) -> tuple[ir.Node | None, ir.Node | None]:
    """The outlined Quantize of the norm's result, and the Mul by channel before it if one is."""
    for use in norm.result.uses():
        if _quantizes(use.node, norm):
            return use.node, None
    for use in norm.result.uses():
        reader = only_consumer(use.node.outputs[0]) if _smoothing(use.node, norm) else None
        if reader is not None and _quantizes(reader, norm):
            return reader, use.node
    return None, None


def _quantizes(node: ir.Node, norm: Norm) -> bool:
    region = region_of(node)
    quantizes = isinstance(region, Region) and region.anchor in ("Quantize", "QuantizeFp8")
    if not quantizes or node.graph is not norm.nodes[-1].graph:
        return False
    assert isinstance(region, Region)
    return region.size("K") == norm.depth


def _smoothing(node: ir.Node, norm: Norm) -> ir.Value | None:
    """The constant of one factor per channel that `node` multiplies the norm's result by."""
    if node.op_type != "Mul" or node.domain != "" or node.graph is not norm.nodes[-1].graph:
        return None
    factor = next((value for value in node.inputs if value is not norm.result), None)
    array = constant(factor)
    fits = array is not None and array.shape == (norm.depth,) and array.dtype == _dtype(norm)
    return factor if fits else None


def _dtype(norm: Norm) -> np.dtype[Any]:
    """What is read and made."""
    return np.dtype(np.float16 if norm.x.dtype is ir.DataType.FLOAT16 else np.float32)


def _is_read(value: ir.Value, inside: list[ir.Node]) -> bool:
    """Whether anything but the nodes of the region reads `value`."""
    return value.is_graph_output() or any(use.node not in inside for use in value.uses())


def _region(found: _Found) -> Region:
    norm, quantize = found.norm, region_of(found.quantize) if found.quantize else None
    to_fp8 = isinstance(quantize, Region) and quantize.anchor == "QuantizeFp8"
    half = (HALF,) if norm.x.dtype is ir.DataType.FLOAT16 else ()
    return Region(
        ("Add" if found.add else "") + norm.op + ("Fp8" if to_fp8 else ""),
        (("K", norm.depth),),
        extras=("channel",) if found.smooth else (),
        outputs=tuple(found.results),
        attributes=(("epsilon", norm.epsilon),),
        flags=(*half, *(("smoothed",) if found.smooth else ())),
    )


def _outlined(model: ir.Model, found: _Found) -> ir.Node:
    """A call of the region."""
    norm, graph = found.norm, model.graph
    operands = found.reads
    operands.append(_parameter(graph, norm.gamma, norm))
    if norm.op == "LayerNorm" and norm.beta is not None:
        operands.append(_parameter(graph, norm.beta, norm))
    elif norm.op == "LayerNorm":
        zeros = np.zeros(norm.depth, _dtype(norm))
        operands.append(new_initializer(graph, f"{norm.gamma.name}_zeros", zeros))
    if found.smooth:
        operands.append(_smoothing(found.smooth, norm))
    new = outline(model, _region(found), operands, like=norm.nodes[-1])
    around = {"a residual": found.add, "smoothing": found.smooth, "Quantize": found.quantize}
    fused = [name for name, node in around.items() if node is not None]
    decide(new, "body", f"fused with {' and '.join(fused)}" if fused else "outlined")
    return new


def _parameter(graph: ir.Graph, value: ir.Value, norm: Norm) -> ir.Value:
    """A constant in the type of what is read; one in float32 is rounded."""
    array = constant(value)
    assert array is not None
    if array.dtype == _dtype(norm):
        return value
    return new_initializer(graph, f"{value.name}_float16", array.astype(_dtype(norm)))
