"""Let a product quantize windows of its input where they are, instead of copies.

    q, s = Quantize_K1152(Concat(p[0:-2:2], p[1:-1:2], p[2::2]))
    y = QMatMulW8A8_K1152_N384_AddC_Gelu(q, s, w, ws, b)
        =>  y = WindowedQMatMulW8A8_K1152_N384_R3_S2_AddC_Gelu(p, w, ws, b)

Rows of p that follow each other are one longer row in memory, at every second row if the stride is
two.  Zeros around rows are not stored either, p = Pad(x):

        =>  y = WindowedQMatMulW8A8_K1152_N384_R3_S2_AddC_Gelu_f00bd2(x, w, ws, b)

Windows may have holes, Concat(p[0:-4], p[2:-2], p[4:]), as dilated convolutions have them: a core
copies a few at a time to where it quantizes them.

Convolutions of one dimension become such products (`unfold_convolutions`).  No Pad is of integers
there: rows are quantized by a scale of each window, so not before there are windows, and
convolutions of static scales pad by themselves.  Pads by what is no zero, by the edge or by
reflection are left.

Such a product does not quantize its result, too: if what reads that would have it as integers,
`fuse_requantize` gets the products whose results are wider than what is copied of their windows.
So this runs before it and `fuse_quantize`, and after `merge_siblings`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.ir.decisions import add_note, decide, decision_of, region_of
from qcompiler.ir.graph import constant, drop_if_unread, only_consumer
from qcompiler.ir.region import Region
from qcompiler.passes.fuse_quantize import only_product
from qcompiler.passes.fuse_requantize import quantizing_readers
from qcompiler.passes.outlining import JoiningPass, outline
from qcompiler.passes.zero_pads import drop_unread_pad, zero_pads

__all__ = ["FuseWindows"]


_LEFT = "copies of its windows cost less than a result of floats"
"""On a core of Zen 4 a product of 3000 rows and the next one take 0.97 of the time with windows in
their place and a result of 384 floats, where windows are 192 or 240 wide; 1.03 where they are 120,
and 1.22 with windows of 48 and a result of 1024."""


@dataclasses.dataclass(frozen=True)
class _Windows:
    """What a product multiplies: rows of `taps` rows of `x`, every `step`th one and those after it.

    Attributes:
        x: What is read.
        taps: How many.
        step: How many rows further the next begins.
        dilation: How many rows further the next row of each is.
        copies: The nodes that make them and nothing else.
        pads: How many rows of zeros are before and behind those of `x`.
    """

    x: ir.Value
    taps: int
    step: int
    dilation: int
    copies: tuple[ir.Node, ...]
    pads: tuple[int, int] = (0, 0)

    def copied(self, depth: int) -> int:
        """Floats that are stored for each row of `depth`: a Slice of each tap, and their Concat."""
        return depth if self.taps == 1 else 2 * depth


class FuseWindows(JoiningPass):
    """Join each outlined product with its Quantize, and the Pad, Slices and Concat before that."""

    def join(self, model: ir.Model, quantize: ir.Node) -> bool:
        """Join a Quantize with the product that reads it and with what makes its windows."""
        product = only_product(quantize)
        region = region_of(product) if product is not None else None
        if product is None or region is None:
            return False
        able = (
            (windows, whole)
            for windows in _alternatives(quantize)
            for whole in [_reading(region, windows)]
            if self.refusal(whole, [*windows.copies, quantize, product]) is None
        )
        windows, whole = next(able, (None, region))
        if windows is None:
            return False
        is_quantized = not region.widths and bool(quantizing_readers(product.outputs[0]))
        if is_quantized and region.size("N") > windows.copied(region.size("K")):
            add_note(product, _LEFT)
            return False
        nodes = [*windows.copies, quantize, product]
        numbers = {value for node in windows.copies for value in node.inputs[1:] if value}
        source = nodes[0].inputs[0]  # behind the zeros, if there are any
        new = outline(model, whole, [windows.x, *product.inputs[2:]], like=product)
        zeros = ", with zeros around it" if any(windows.pads) else ""
        instead = ", and so not its result" if is_quantized else ""
        why = f"{decision_of(product).why}; quantizes windows of its input{zeros}{instead}"
        decide(new, "body", why)
        self.put(new, nodes, product.outputs)
        for number in numbers:
            drop_if_unread(number)
        if source is not windows.x:
            drop_unread_pad(source)
        return True


def _reading(region: Region, windows: _Windows) -> Region:
    """The region of a product, as one of windows."""
    dilations = (("dilations", (windows.dilation,)),) if windows.dilation > 1 else ()
    pads = (("pads", windows.pads),) if any(windows.pads) else ()
    return dataclasses.replace(
        region,
        anchor="WindowedQMatMulW8A8",
        sizes=(*region.sizes, ("R", windows.taps), ("S", windows.step)),
        attributes=(*dilations, *pads),
    )


def _alternatives(quantize: ir.Node) -> Iterator[_Windows]:
    """What windows a Quantize reads, those around which there are zeros first."""
    found = _windows(quantize)
    if found is None:
        return
    pad = found.x.producer()
    pads = zero_pads(pad, axis=-2) if pad is not None and pad.graph is quantize.graph else None
    if pad is not None and pads is not None:
        x = pad.inputs[0]
        assert x is not None
        yield dataclasses.replace(found, x=x, pads=pads)
    if found.copies:
        yield found


def _windows(quantize: ir.Node) -> _Windows | None:
    """What a Quantize reads windows of; one row each where it reads no copies."""
    read = quantize.inputs[0]
    last = read.producer() if read is not None else None
    rank = len(read.shape) if read is not None and read.shape is not None else 0
    if read is None or last is None or last.domain or rank < 2:
        return None
    taps = _taps(last, rank)
    if taps is None:
        return _Windows(read, 1, 1, 1, ())
    copies = tuple(dict.fromkeys([*taps, last]))
    if only_consumer(read) is not quantize:
        return None
    x, step, dilation = taps[0].inputs[0], _step(taps[0]), _dilation(taps)
    fits = all(
        node.graph is quantize.graph
        and (node is last or only_consumer(node.outputs[0]) is last)
        and node.inputs[0] is x
        and _takes(node, _bounds(tap, len(taps), dilation), rank, step)
        for tap, node in enumerate(taps)
    )
    if x is None or step is None or not fits or last.graph is not quantize.graph:
        return None
    return _Windows(x, len(taps), step, dilation, copies)


def _taps(last: ir.Node, rank: int) -> list[ir.Node] | None:
    """The Slices, if there are any, that a Concat of columns joins, or the one it is."""
    if last.op_type == "Slice":
        return [last]
    if last.op_type != "Concat" or last.attributes.get_int("axis", 0) not in (-1, rank - 1):
        return None
    makers = [value.producer() for value in last.inputs if value is not None]
    slices = [node for node in makers if node is not None and node.op_type == "Slice"]
    return slices if len(slices) == len(last.inputs) else None


def _dilation(taps: Sequence[ir.Node]) -> int:
    """How many rows behind the first the second Slice begins, if these are windows."""
    first = _integer(taps[1].inputs[1]) if len(taps) > 1 and len(taps[1].inputs) > 1 else None
    return max(1, first or 1)


def _bounds(tap: int, taps: int, dilation: int) -> tuple[int, int | None]:
    """The first row of a tap, and how many behind the last it leaves out, as a negative number."""
    return tap * dilation, (tap - taps + 1) * dilation or None


def _takes(node: ir.Node, bounds: tuple[int, int | None], rank: int, step: int | None) -> bool:
    """Whether a Slice takes every `step`th row between two bounds, of the axis before the last."""
    numbers = [_integer(value) for value in node.inputs[1:]]
    if node.domain != "" or len(numbers) < 3:
        return False
    first, last = bounds
    ends = [last] if last is not None else [np.iinfo(np.int64).max, np.iinfo(np.int32).max]
    axes = (rank - 2, -2)
    return numbers[0] == first and numbers[1] in ends and numbers[2] in axes and _step(node) == step


def _step(node: ir.Node) -> int | None:
    """That of a Slice of one axis, if it goes forwards."""
    step = _integer(node.inputs[4]) if len(node.inputs) > 4 else 1
    return step if step is not None and step > 0 else None


def _integer(value: ir.Value | None) -> int | None:
    array = constant(value)
    return int(array.item()) if array is not None and array.size == 1 else None
