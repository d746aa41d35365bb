"""Multiply a one-dimensional convolution's windows as rows of a matrix, where that is faster.

    y = Conv(x, W, b)   =>   y = Transpose(Add(MatMul(windows, W'), b))

    windows = Concat(Slice(p, j d :: s) for each tap j),    p = Pad(Transpose(x))

A product has scales of its own for each row, which need no samples and cost less accuracy than one
for all, and kernels that add the bias and what follows.  A Pad by zeros before the convolution, as
causal ones have, becomes one with its own.  Transposes move behind elementwise ops to
where others undo them (`sink_transposes`).  Speech models begin with such convolutions; those of
one tap are the feed-forward layers of others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.ir.decisions import NodePlan, add_note, inherit, plan_of, set_plan
from qcompiler.ir.graph import constant, drop_if_unread, new_initializer, replace_nodes
from qcompiler.ir.region import Region
from qcompiler.ir.sites import Candidate, Costs, Site
from qcompiler.ir.types import PerAxis, PerGroup, QuantSpec, QuantType
from qcompiler.passes.choose_kernels import ChooseKernels
from qcompiler.passes.conv_pads import explicit_pads
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.infer_shapes import InferShapes
from qcompiler.passes.integer_part import MARGIN
from qcompiler.passes.sink_transposes import TOKENS_LAST, sink_transpose
from qcompiler.passes.sites_of_nodes import Shape, known_shapes, product_site, site_of
from qcompiler.passes.whole_pads import name_all_axes
from qcompiler.passes.zero_pads import drop_unread_pad, zero_pads

__all__ = ["UnfoldConvolutions"]

_MOST_TAPS = 16
"""A Slice each: a spectrum written as a convolution has hundreds, and one channel."""
_ROWS = 128
"""Windows of a convolution of which nothing is known."""
_END = np.iinfo(np.int64).max


class UnfoldConvolutions(ir.passes.InPlacePass):
    """Turn planned convolutions into products where those cost less.

    Attributes:
        choose: Knows costs and shapes, and chooses among what this pass leaves; without it every
            convolution that can be is unfolded.
        rounding: How weights of products are rounded.
    """

    def __init__(self, choose: ChooseKernels | None = None, rounding: str = "nearest") -> None:
        super().__init__()
        self.choose, self.rounding = choose, rounding

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Unfold the convolutions of the main graph that gain by it."""
        able = [node for node in model.graph if _can_be_product(node)]
        chosen = able if self.choose is None else _cheaper(self.choose, model, able)
        if self.choose is not None:
            self.choose.unfolded = frozenset(node.name or "" for node in chosen)
        columns: dict[ir.Value, ir.Value] = {}
        for node in chosen:
            _unfold(model.graph, node, self.rounding, columns)
        if chosen:
            name_all_axes(model.graph)
            FixNames()(model)
            InferShapes()(model)
        return ir.passes.PassResult(model, bool(chosen))


def _can_be_product(node: ir.Node) -> bool:
    plan, weight = plan_of(node), constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if node.op_type != "Conv" or node.domain or plan is None or weight is None:
        return False
    # What a recipe says of a convolution is about its static activations.
    asked = plan.requested or plan.calibration is not None
    if asked or weight.ndim != 3 or node.attributes.get_int("group", 1) > 1:
        return False
    if weight.shape[2] > _MOST_TAPS:
        return False
    return explicit_pads(node, weight.shape[2:]) is not None


def _cheaper(choose: ChooseKernels, model: ir.Model, nodes: Sequence[ir.Node]) -> list[ir.Node]:
    """Those whose product takes less time than the convolution, in integers or floats."""
    if choose.made is not None:
        products = {c.node for c in choose.made if c.site.startswith("MatMul")}
        return [node for node in nodes if node.name in products]
    if choose.forced or not nodes:  # what is faster by itself has made the whole slower
        return []
    shapes = known_shapes(model, [v for n in nodes if (v := n.inputs[0])], choose.shapes)
    pairs = [_rivals(choose, node, shapes) for node in nodes]
    costs = choose.costs([site for pair in pairs for site in pair])
    weighed = zip(nodes, pairs, zip(costs[::2], costs[1::2], strict=True), strict=True)
    return [node for node, pair, prices in weighed if _wins(choose, pair, prices)]


def _rivals(choose: ChooseKernels, node: ir.Node, shapes: Mapping[str, Shape]) -> tuple[Site, Site]:
    """A convolution and its product, as sites."""
    data = node.inputs[0]
    shape = shapes.get(data.name or "" if data is not None else "") or _some_shape(node)
    conv = dataclasses.replace(site_of(node, (), choose.supports), inputs=(shape,))
    width, channels, taps = conv.weight
    rows, depth = max(1, shape[0] * conv.result(shape)[2]), channels * taps
    return conv, product_site((depth, width), ((rows, depth),), choose.supports)


def _wins(
    choose: ChooseKernels, rivals: tuple[Site, Site], costs: tuple[Costs | None, Costs | None]
) -> bool:
    """Whether the product is faster, what turns its input and copies its windows included.

    To turn or to copy a value takes 0.8 ns on a core of Zen 4, to convert it at a border an eighth.
    """
    (conv, product), (before, after) = rivals, costs
    if not product.kernel or before is None or after is None:
        return False
    copies = 0 if _reads_in_place(choose, conv, product) else conv.weight[2]
    copied = math.prod(conv.inputs[0]) + (copies > 1) * math.prod(product.inputs[0])
    candidates: tuple[Candidate, ...] = ("float", "ort") if choose.observed else ("float",)
    time = after.mean("kernel") + choose.border(6 * copied) + max(1, copies) * choose.border(0)
    return time * MARGIN < min(map(before.mean, candidates))


def _reads_in_place(choose: ChooseKernels, conv: Site, product: Site) -> bool:
    """Whether the product's windows need not be copied (`fuse_windows`)."""
    numbers = (*product.weight, conv.weight[2], conv.attribute("strides")[0])
    sizes = tuple(zip("KNRS", numbers, strict=True))
    dilations = conv.attribute("dilations")
    attributes = (("dilations", dilations),) if dilations[0] > 1 else ()
    region = Region("WindowedQMatMulW8A8", sizes, attributes=attributes)
    return choose.supports(region) is None


def _some_shape(node: ir.Node) -> Shape:
    """One sample of as many frames as the graph says, or enough for `_ROWS` windows."""
    data, weight = node.inputs[:2]
    assert data is not None and weight is not None and weight.const_value is not None
    _, channels, taps = weight.const_value.shape.numpy()
    known = None if data.shape is None or len(data.shape) < 3 else data.shape[2]
    if isinstance(known, int) and known > 0:
        return 1, channels, known
    stride = node.attributes.get_ints("strides", [1])[0]
    span = node.attributes.get_ints("dilations", [1])[0] * (taps - 1) + 1
    return 1, channels, (_ROWS - 1) * stride + span


def _unfold(graph: ir.Graph, conv: ir.Node, rounding: str, known: dict[ir.Value, ir.Value]) -> None:
    """Put the product in the place of a convolution; `known` are columns of shared weights."""
    padded, weight, *rest = conv.inputs
    x, more = _without_pad(padded)
    kernel, bias = constant(weight), rest[0] if rest else None
    assert weight is not None and kernel is not None
    name, (width, channels, taps) = conv.name, kernel.shape
    turned = _node("Transpose", [x], name, "turned", perm=TOKENS_LAST)
    begin, end = explicit_pads(conv, [taps]) or (0, 0)
    pads = begin + more[0], end + more[1]
    windows = _windowed(graph, conv, turned.outputs[0], taps, pads)
    columns = known.get(weight)
    if columns is None:
        matrix = kernel.transpose(2, 1, 0).reshape(taps * channels, width)
        stored = np.ascontiguousarray(matrix)
        columns = known[weight] = new_initializer(graph, f"{weight.name}_columns", stored)
    last = windows[-1].outputs[0] if windows else turned.outputs[0]
    product = _node("MatMul", [last, columns], name, "product")
    chain = [turned, *windows, product]
    if bias is not None:
        chain.append(_node("Add", [product.outputs[0], bias], name, "bias"))
    back = _node("Transpose", [chain[-1].outputs[0]], name, "back", perm=TOKENS_LAST)
    inherit(product, conv)
    set_plan(product, _plan(taps * channels, rounding))
    add_note(product, f"a convolution of {taps} taps, its windows as rows")
    replace_nodes([conv], [*chain, back])
    drop_if_unread(weight)
    drop_unread_pad(padded)
    sink_transpose(turned)
    sink_transpose(back)


def _without_pad(data: ir.Value | None) -> tuple[ir.Value, tuple[int, int]]:
    """What a convolution reads, before zeros are put around its tokens, and how many those are."""
    assert data is not None
    pad = data.producer()
    pads = zero_pads(pad, axis=-1) if pad is not None else None
    source = pad.inputs[0] if pad is not None and pads is not None else None
    return (data, (0, 0)) if source is None or pads is None else (source, pads)


def _windowed(
    graph: ir.Graph, conv: ir.Node, tokens: ir.Value, taps: int, pads: tuple[int, int]
) -> list[ir.Node]:
    """What makes rows of windows of [N, tokens, channels]."""
    name, attributes = conv.name, conv.attributes
    begin, end = pads
    stride, dilation = (attributes.get_ints(key, [1])[0] for key in ("strides", "dilations"))
    nodes: list[ir.Node] = []

    def numbers(stem: str, *values: int) -> ir.Value:
        return new_initializer(graph, f"{name}_{stem}", np.array(values, np.int64))

    if begin or end:
        nodes.append(_node("Pad", [tokens, numbers("pads", 0, begin, 0, 0, end, 0)], name, "pad"))
        tokens = nodes[-1].outputs[0]
    if taps == stride == 1:
        return nodes
    axis, step, parts = numbers("axis", 1), numbers("stride", stride), []
    for tap in range(taps):
        # As many rows are cut off at the end as the taps behind this one reach over.
        left = (tap - taps + 1) * dilation
        bounds = [numbers(f"first_{tap}", tap * dilation), numbers(f"end_{tap}", left or _END)]
        parts.append(_node("Slice", [tokens, *bounds, axis, step], name, f"tap_{tap}"))
    nodes += parts
    if taps > 1:
        nodes.append(_node("Concat", [p.outputs[0] for p in parts], name, "windows", axis=2))
    return nodes


def _plan(depth: int, rounding: str) -> NodePlan:
    """That of any product for x86-int8, see `node_plans`; x86-int4 has int8 convolutions, too."""
    rows = QuantType(ir.DataType.INT8, granularity=PerGroup(-1, depth))
    weight = QuantType(ir.DataType.INT8, granularity=PerAxis(1), narrow_range=True)
    return NodePlan(weight, QuantSpec(rows, "dynamic"), rounding=rounding)


def _node(
    op: str, inputs: Sequence[ir.Value], name: str | None, stem: str, **attributes: object
) -> ir.Node:
    node = ir.node(op, inputs, attributes, name=f"{name}_{stem}")
    node.outputs[0].name, node.outputs[0].dtype = node.name, ir.DataType.FLOAT
    return node
