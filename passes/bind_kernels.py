"""Name the kernel domain after everything its results depend on.

    qcompiler.region::QMatMulW8A8_K384_N384   =>   qcompiler.1a2b3c4d::QMatMulW8A8_K384_N384

The hash covers the function bodies, the kernel ABI and the generators, so a library built from
other sources has another domain: a session then runs the bodies, never wrong numbers.
"""

from __future__ import annotations

import hashlib

import onnx_ir as ir

from qcompiler.ir.decisions import decide, decision_of, region_of
from qcompiler.ir.graph import every_node
from qcompiler.ir.region import Region
from qcompiler.passes.outlining import UNBOUND

__all__ = ["BindKernels", "bound_domain", "bound_regions"]


class BindKernels(ir.passes.InPlacePass):
    """Move outlined regions into a domain named by hash, where the library registers kernels.

    Attributes:
        fingerprint: Hash of the kernel generators, glue and ABI.
    """

    def __init__(self, fingerprint: str) -> None:
        super().__init__()
        self.fingerprint = fingerprint

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rename the domain of regions, of their functions and of the import."""
        nodes = [node for node in every_node(model.graph) if node.domain == UNBOUND]
        if not nodes:
            return ir.passes.PassResult(model, False)
        functions = [f for key, f in list(model.functions.items()) if key[0] == UNBOUND]
        domain = f"qcompiler.{self._hash(functions)}"
        for function in functions:
            del model.functions[function.identifier()]
            function.domain = domain
            model.functions[function.identifier()] = function
        for node in nodes:
            node.domain = domain
            decide(node, "kernel", decision_of(node).why)
        model.graph.opset_imports[domain] = model.graph.opset_imports.pop(UNBOUND)
        return ir.passes.PassResult(model, True)

    def _hash(self, functions: list[ir.Function]) -> str:
        digest = hashlib.sha256(self.fingerprint.encode())
        for function in sorted(functions, key=lambda f: f.name):
            digest.update(ir.to_proto(function).SerializeToString(deterministic=True))
        return digest.hexdigest()[:8]


def bound_domain(model: ir.Model) -> str | None:
    """The domain that kernels are registered in, None if nothing was bound."""
    domains = [d for d in model.graph.opset_imports if d.startswith("qcompiler.") and d != UNBOUND]
    return domains[0] if domains else None


def bound_regions(model: ir.Model) -> list[Region]:
    """The distinct regions to build kernels for, by name."""
    found: dict[str, Region] = {}
    for node in every_node(model.graph):
        region = region_of(node)
        if region is not None:
            assert found.setdefault(region.name, region) == region, f"two regions {region.name}"
    return [found[name] for name in sorted(found)]
