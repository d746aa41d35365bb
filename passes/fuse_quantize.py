"""Let a product quantize its own input, where nothing else reads the integers.

    y = QMatMulW8A8_K384_N384_AddC(Quantize_K384(x), w, ws, b)
        =>  y = DynamicQMatMulW8A8_K384_N384_AddC(x, w, ws, b)

Threads need not wait for each other between the two, and the integers never leave a core's cache.
Runs after `fuse_norms` and `merge_siblings`, which have better uses for a Quantize.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from qcompiler.ir.decisions import decide, decision_of, region_of
from qcompiler.ir.graph import only_consumer
from qcompiler.passes.outlining import UNBOUND, JoiningPass, outline

__all__ = ["FuseQuantize", "only_product"]


class FuseQuantize(JoiningPass):
    """Join each outlined Quantize with the one outlined product that reads it."""

    def join(self, model: ir.Model, quantize: ir.Node) -> bool:
        """Join a Quantize with the product that reads it."""
        product = only_product(quantize)
        region = region_of(product) if product is not None else None
        if product is None or region is None:
            return False
        whole = dataclasses.replace(region, anchor="DynamicQMatMulW8A8")
        if self.refusal(whole, [quantize, product]) is not None:
            return False
        operands = [*quantize.inputs, *product.inputs[2:]]
        new = outline(model, whole, operands, like=product)
        decide(new, "body", f"{decision_of(product).why}; quantizes its input")
        self.put(new, [quantize, product], product.outputs)
        return True


def only_product(quantize: ir.Node) -> ir.Node | None:
    """The product of the same graph that alone reads both results of an outlined Quantize."""
    region = region_of(quantize) if quantize.domain == UNBOUND else None
    if region is None or region.anchor != "Quantize":
        return None
    q, s = quantize.outputs
    product = only_consumer(q)
    if product is None or product is not only_consumer(s) or product.graph is not quantize.graph:
        return None
    found = region_of(product) if product.domain == UNBOUND else None
    fits = found is not None and found.anchor == "QMatMulW8A8" and found.flags == region.flags
    return product if fits and list(product.inputs[:2]) == [q, s] else None
