"""By which names of a checkpoint the products of a model go."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from qcompiler.ir.graph import constant, every_node
from qcompiler.passes.node_names import names_of

__all__ = ["plain_name", "products_called", "products_of", "weight_names"]


def weight_names(model: ir.Model) -> dict[str, str]:
    """By the name of a product, what its weight is called: turned over, it gets another name."""
    found = {}
    for node in every_node(model.graph):
        value = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
        maker = None if value is None else value.producer()
        if maker is not None and maker.op_type == "Transpose":
            value = maker.inputs[0]
        if value is not None and value.const_value is not None:
            found[node.name or ""] = value.name or ""
    return found


def products_of(model: ir.Model, weights: Mapping[str, str]) -> dict[str, ir.Node]:
    """MatMuls by constant matrices, by every name that they go by."""
    found: dict[str, ir.Node] = {}
    for node in every_node(model.graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        array = constant(weight)
        if weight is not None and array is not None and array.ndim == 2:
            for name in (*names_of(node), weight.name or "", weights.get(node.name or "", "")):
                found.setdefault(plain_name(name), node)
    return found


def plain_name(name: str) -> str:
    """Without what exporters put around the name of a module."""
    name = name.replace("/", ".").strip(".")
    for ending in (".weight", ".MatMul", ".Gemm"):
        name = name.removesuffix(ending)
    return name


def products_called(name: str, products: Mapping[str, ir.Node]) -> list[ir.Node]:
    """The products that a layer of this name may be: the one called so, or those that end alike."""
    wanted = plain_name(name)
    if wanted in products:
        return [products[wanted]]
    ends = {
        id(node): node
        for name, node in products.items()
        if name and (name.endswith(f".{wanted}") or wanted.endswith(f".{name}"))
    }
    return list(ends.values())
