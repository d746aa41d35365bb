"""The site of a node, and the shapes that matter: what `choose_kernels` has costs of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from qcompiler.ir.region import Region
from qcompiler.ir.sites import Site

__all__ = ["Shape", "Shapes", "known_shapes", "product_site", "site_of"]

Shape = tuple[int, ...]
Shapes = Callable[[ir.Model, Sequence[str]], Mapping[str, Shape]]
"""Of the named tensors, the shapes they have where that matters; absent where nobody knows."""

Supports = Callable[[Region], str | None]
"""Says why there is no kernel for a region, or None if there is one."""

_CONV_ATTRIBUTES = {"dilations": 1, "pads": 0, "strides": 1}


def known_shapes(model: ir.Model, values: Sequence[ir.Value], shapes: Shapes) -> dict[str, Shape]:
    """Shapes in full of those values that have one, from the graph or from `shapes`."""
    values = list(dict.fromkeys(values))
    known = {v.name or "": shape for v in values if (shape := _static(v)) is not None}
    reachable = {v.name for node in model.graph for v in node.outputs}
    reachable |= {v.name for v in model.graph.inputs}
    names = [v.name or "" for v in values if v.name not in known and v.name in reachable]
    return known | dict(shapes(model, list(dict.fromkeys(names))) if names else {})


def site_of(node: ir.Node, inputs: tuple[Shape, ...], supports: Supports) -> Site:
    """The site of a MatMul or Conv with a constant weight, whose data has these shapes."""
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    sizes = tuple(weight.const_value.shape.numpy())
    if node.op_type == "MatMul":
        return product_site(sizes, inputs, supports)
    axes = len(sizes) - 2
    attributes = [
        (name, tuple(node.attributes.get_ints(name, [usual] * axes * (1 + (name == "pads")))))
        for name, usual in _CONV_ATTRIBUTES.items()
    ]
    group = ("group", (node.attributes.get_int("group", 1),))
    return Site("Conv", sizes, inputs, (group, *attributes))


def product_site(sizes: Shape, inputs: tuple[Shape, ...], supports: Supports) -> Site:
    """The site of a MatMul by a weight of these sizes, [K, N]."""
    region = Region("QMatMulW8A8", (("K", sizes[0]), ("N", sizes[1])))
    return Site("MatMul", sizes, inputs, (), supports(region) is None)


def _static(value: ir.Value) -> Shape | None:
    dims = () if value.shape is None else value.shape.dims
    # Some exporters write -1 for a dimension they do not know.
    sizes = tuple(dim for dim in dims if isinstance(dim, int) and dim >= 0)
    return sizes if sizes and len(sizes) == len(dims) else None
