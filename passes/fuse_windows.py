"""Let a product that quantizes its input read windows of it where they are, instead of copies.

    y = DynamicQMatMulW8A8_K1152_N384_AddC_Gelu(Concat(x[0:-2:2], x[1:-1:2], x[2::2]), w, ws, b)
        =>  y = WindowedQMatMulW8A8_K1152_N384_R3_S2_AddC_Gelu(x, w, ws, b)

Rows of x that follow each other are one longer row in memory, at every second row if the stride is
two.  Convolutions of one dimension become such products (`unfold_convolutions`).  Runs after
`fuse_quantize`.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from qcompiler.ir.decisions import decide, decision_of, region_of
from qcompiler.ir.graph import constant, drop_if_unread, only_consumer
from qcompiler.passes.outlining import UNBOUND, JoiningPass, outline

__all__ = ["FuseWindows"]


class FuseWindows(JoiningPass):
    """Join each outlined product with the Slices and the Concat that make its input."""

    def join(self, model: ir.Model, product: ir.Node) -> bool:
        """Join a product with what makes the windows that it quantizes."""
        region = region_of(product) if product.domain == UNBOUND else None
        if region is None or region.anchor != "DynamicQMatMulW8A8":
            return False
        found = _windows(product)
        if found is None:
            return False
        x, step, copies = found
        sizes = (*region.sizes, ("R", len(copies) - 1), ("S", step))
        whole = dataclasses.replace(region, anchor="WindowedQMatMulW8A8", sizes=sizes)
        nodes = [*copies, product]
        if self.refusal(whole, nodes) is not None:
            return False
        numbers = {value for node in copies[:-1] for value in node.inputs[1:] if value is not None}
        new = outline(model, whole, [x, *product.inputs[1:]], like=product)
        decide(new, "body", f"{decision_of(product).why}; reads windows of it")
        self.put(new, nodes, product.outputs)
        for number in numbers:
            drop_if_unread(number)
        return True


def _windows(product: ir.Node) -> tuple[ir.Value, int, list[ir.Node]] | None:
    """What a product reads windows of, how far apart they are, and the nodes that make them."""
    windows = product.inputs[0]
    concat = windows.producer() if windows is not None else None
    if concat is None or concat.op_type != "Concat" or concat.domain != "":
        return None
    if only_consumer(concat.outputs[0]) is not product or concat.graph is not product.graph:
        return None
    if windows in product.inputs[1:]:  # what is added to the result, where N is K
        return None
    slices = [value.producer() for value in concat.inputs if value is not None]
    taps = [node for node in slices if node is not None]
    step = _step(slices[0])
    if step is None or len(taps) != len(concat.inputs):
        return None
    x = taps[0].inputs[0]
    rank = len(x.shape) if x is not None and x.shape is not None else 0
    if x is None or rank < 2 or concat.attributes.get_int("axis", 0) not in (-1, rank - 1):
        return None
    fits = all(
        only_consumer(node.outputs[0]) is concat
        and node.graph is product.graph
        and node.inputs[0] is x
        and _takes(node, _bounds(tap, len(taps)), rank, step)
        for tap, node in enumerate(taps)
    )
    return (x, step, [*taps, concat]) if fits else None


def _bounds(tap: int, taps: int) -> tuple[int, int | None]:
    """The first row of a tap, and how many behind the last it leaves out, as a negative number."""
    return tap, tap - taps + 1 or None


def _takes(node: ir.Node, bounds: tuple[int, int | None], rank: int, step: int) -> bool:
    """Whether a Slice takes every `step`th row between two bounds, of the axis before the last."""
    numbers = [_integer(value) for value in node.inputs[1:]]
    if node.op_type != "Slice" or node.domain != "" or len(numbers) < 3:
        return False
    first, last = bounds
    ends = [last] if last is not None else [np.iinfo(np.int64).max, np.iinfo(np.int32).max]
    axes = (rank - 2, -2)
    return numbers[0] == first and numbers[1] in ends and numbers[2] in axes and _step(node) == step


def _step(node: ir.Node | None) -> int | None:
    """That of a Slice of one axis, if it goes forwards."""
    if node is None or node.op_type != "Slice":
        return None
    step = _integer(node.inputs[4]) if len(node.inputs) > 4 else 1
    return step if step is not None and step > 0 else None


def _integer(value: ir.Value | None) -> int | None:
    array = constant(value)
    return int(array.item()) if array is not None and array.size == 1 else None
