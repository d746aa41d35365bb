"""Merge products of one input into one, with their weights side by side and a result each.

    a = QMatMulW8A8_K384_N384_AddC(q, s, wa, wsa, ba)
    b = QMatMulW8A8_K384_N384_AddC(q, s, wb, wsb, bb)
        =>  a, b = QMatMulW8A8_K384_N768_AddC_384x384(q, s, [wa wb], [wsa wsb], [ba bb])

Query, key and value of an attention: one node instead of three, and its threads are handed work
once.  Epilogues must be the same, but for a bias or a factor that some have and others do not:
those get zeros or ones.  Runs after `fuse_regions`, on what that outlined.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qcompiler.ir.decisions import decide, region_of
from qcompiler.ir.dialect import OPS
from qcompiler.ir.graph import constant, every_node, new_initializer
from qcompiler.ir.region import HALF, ExtraKind, Region, Step
from qcompiler.passes.outlining import UNBOUND, RegionPass, outline

__all__ = ["MergeSiblings"]

_NEUTRAL = {"Add": 0.0, "Mul": 1.0}

_MERGEABLE = frozenset({
    "QMatMulW8A8", "QMatMulU8S8", "QMatMulU8U8", "QMatMulW4A8", "QMatMulW4S8A8",
    "QMatMulW4A16", "QMatMulW4Z4A16", "QMatMulFp8",
})  # fmt: skip


class MergeSiblings(RegionPass):
    """Merge outlined products that read the same activations, where a kernel can compute them."""

    def outline_all(self, model: ir.Model) -> bool:
        """Merge siblings of every graph, branches and loops included."""
        merged = 0
        for node in list(every_node(model.graph)):
            if node.graph is not None and _is_mergeable(node):
                merged += self._merge(model, _siblings(node))
        if merged:
            common.RemoveUnusedNodesPass()(model)
        return merged > 0

    def _merge(self, model: ir.Model, nodes: Sequence[ir.Node]) -> bool:
        regions = [_region(node) for node in nodes]
        steps = _common_steps([region.steps for region in regions])
        if len(nodes) < 2 or steps is None:
            return False
        widths = tuple(region.size("N") for region in regions)
        sizes = tuple(
            (name, sum(widths) if name == "N" else size) for name, size in regions[0].sizes
        )
        channel: ExtraKind = "channel"
        extras = (channel,) * sum(len(step.args) - 1 for step in steps)
        whole = dataclasses.replace(
            regions[0], sizes=sizes, extras=extras, steps=steps, widths=widths
        )
        if self.refusal(whole, nodes) is not None:
            return False
        self.put(_merged(model, nodes, whole), nodes, [node.outputs[0] for node in nodes])
        return True


def _region(node: ir.Node) -> Region:
    region = region_of(node)
    assert region is not None
    return region


def _is_mergeable(node: ir.Node) -> bool:
    """Whether it is a product whose epilogue only reads constants, each step the one before."""
    region = region_of(node) if node.domain == UNBOUND else None
    return (
        region is not None
        and region.anchor in _MERGEABLE
        and not region.widths
        and all(kind == "channel" for kind in region.extras)
        and region.is_chain()
    )


def _siblings(node: ir.Node) -> list[ir.Node]:
    """The mergeable nodes of the same graph with the same activations, in order."""
    q, form, shared = node.inputs[0], _form(_region(node)), node.inputs[: _weight(node)]
    assert q is not None and node.graph is not None
    found = {use.node for use in q.uses() if use.node.graph is node.graph}
    return [
        other
        for other in node.graph
        if other in found
        and _is_mergeable(other)
        and (_form(_region(other)), other.inputs[: _weight(other)]) == (form, shared)
    ]


def _form(region: Region) -> Region:
    """What siblings have in common: all but their columns and what is done with these."""
    sizes = tuple((name, size) for name, size in region.sizes if name != "N")
    return Region(region.anchor, sizes, flags=region.flags)


def _weight(node: ir.Node) -> int:
    """Which input of a product is its weight; those before are its activations."""
    return OPS[_region(node).anchor].inputs.index("w")


def _common_steps(chains: Sequence[tuple[Step, ...]]) -> tuple[Step, ...] | None:
    """The longest of the chains if the others only lack neutral steps of it."""
    longest = max(chains, key=len)
    return longest if all(_aligned(chain, longest) is not None for chain in chains) else None


def _aligned(chain: tuple[Step, ...], longest: tuple[Step, ...]) -> list[bool] | None:
    """For each step of `longest` whether `chain` has it; None if `chain` is no such part of it."""
    left, present = list(chain), []
    for step in longest:
        has = bool(left) and (left[0].op, left[0].attributes) == (step.op, step.attributes)
        if not has and (step.op not in _NEUTRAL or len(step.args) != 2):
            return None
        present.append(has)
        left = left[1:] if has else left
    return present if not left else None


def _merged(model: ir.Model, nodes: Sequence[ir.Node], whole: Region) -> ir.Node:
    """One product by the weights of all, side by side."""
    first, weight = nodes[0], nodes[0].inputs[_weight(nodes[0])]
    operands = [_operands(node, whole) for node in nodes]
    stem = f"{weight.name}_merged" if weight is not None else "merged"
    columns = [
        new_initializer(model.graph, stem, np.concatenate(parts, axis=-1))
        for parts in zip(*operands, strict=True)
    ]
    new = outline(model, whole, [*first.inputs[: _weight(first)], *columns], like=first)
    new.name = " + ".join(node.name or node.op_type for node in nodes)
    decide(new, "body", f"{len(nodes)} products of one input")
    return new


def _operands(node: ir.Node, whole: Region) -> list[np.ndarray]:
    """The weights, what goes with them, and a row per extra of `whole`, neutral where missing."""
    region = _region(node)
    constants = [constant(value) for value in node.inputs[_weight(node) :]]
    found = [array for array in constants if array is not None]
    count = len(OPS[region.anchor].inputs) - _weight(node)
    weights, extras = found[:count], iter(found[count:])
    present = _aligned(region.steps, whole.steps)
    assert present is not None and len(found) == len(constants)
    rows = []
    for step, has in zip(whole.steps, present, strict=True):
        dtype = np.float16 if HALF in region.flags else np.float32
        neutral = np.full(region.size("N"), _NEUTRAL.get(step.op, 0.0), dtype)
        rows += [next(extras) if has else neutral for _ in step.args[1:]]
    return [*weights, *rows]
