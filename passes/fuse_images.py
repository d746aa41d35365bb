"""Let a convolution store its result as the image that the next one reads.

    y = QConvW8A8_…(q, s, z, w, ws, …);  q' = QuantizeImage_…(y, s', z')
        =>   y, q' = QConvImageW8A8_…(q, s, z, w, ws, s', z', …)

without y where nothing else reads it: then a chain of convolutions stays in 8 bits.  Of several
images of one result (other pads, or another scale) the one that most convolutions read is taken;
the others are made of y.  The numbers are the same: y is rounded to float16 in either form.
Runs after `fuse_regions`, whose regions these are.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from qcompiler.ir.decisions import add_note, decide, decision_of, region_of
from qcompiler.ir.region import Region
from qcompiler.passes.outlining import UNBOUND, JoiningPass, outline

__all__ = ["FuseImages"]

_ANCHOR, _WITH_IMAGE, _IMAGE = "QConvW8A8", "QConvImageW8A8", "QuantizeImage"
_INPUTS = 5
"""Of the anchor; extra operands follow."""


class FuseImages(JoiningPass):
    """Join each outlined convolution with an outlined QuantizeImage of its result."""

    def join(self, model: ir.Model, conv: ir.Node) -> bool:
        """Join a convolution with the image of its result."""
        region = _region(conv, _ANCHOR)
        image = _most_read_image(conv) if region is not None else None
        if region is None or image is None:
            return False
        result = conv.outputs[0]
        keeps = result.is_graph_output() or any(use.node is not image for use in result.uses())
        whole = _whole(region, image, keeps)
        if (reason := self.refusal(whole, [conv, image])) is not None:
            add_note(conv, f"its result is not stored as an image: {reason}")
            return False
        operands = [*conv.inputs[:_INPUTS], *image.inputs[1:], *conv.inputs[_INPUTS:]]
        new = outline(model, whole, operands, like=conv)
        decide(new, "body", f"{decision_of(conv).why}; stores its result in 8 bits")
        self.put(new, [conv, image], [*([result] if keeps else []), image.outputs[0]])
        return True


def _region(node: ir.Node, anchor: str) -> Region | None:
    """That of an outlined node with this anchor."""
    region = region_of(node) if node.domain == UNBOUND else None
    return region if isinstance(region, Region) and region.anchor == anchor else None


def _most_read_image(conv: ir.Node) -> ir.Node | None:
    """The image of a result, of the same graph, that most nodes read."""
    readers = (use.node for use in conv.outputs[0].uses())
    images = [node for node in readers if _region(node, _IMAGE) and node.graph is conv.graph]
    return max(images, key=lambda node: len(node.outputs[0].uses()), default=None)


def _whole(region: Region, image: ir.Node, keeps: bool) -> Region:
    """The region of a convolution with the image of its result."""
    made = _region(image, _IMAGE)
    assert made is not None
    return dataclasses.replace(
        region,
        anchor=_WITH_IMAGE,
        attributes=tuple(sorted((*region.attributes, *made.attributes))),
        outputs=("y", "made") if keeps else ("made",),
    )
