"""Products that read the same weights, as the layers of ALBERT do, which are one layer run often.

What is done to a weight for one of them must be done for all, or it is stored once for each.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from qcompiler.passes.planned_products import Products, Rows

__all__ = ["by_weights"]

_Use = tuple[Products, Rows]


def by_weights(sites: Iterable[_Use]) -> list[list[_Use]]:
    """Values and their tokens, those together whose products share a weight; in order."""
    groups: list[list[_Use]] = []
    of: dict[ir.Value | None, list[_Use]] = {}
    for use in sites:
        weights = [node.inputs[1] for node in use[0].nodes]
        joined: list[_Use] = []
        for group in {id(of[weight]): of[weight] for weight in weights if weight in of}.values():
            joined += group
            group.clear()
        joined.append(use)
        groups.append(joined)
        of.update((node.inputs[1], joined) for site, _ in joined for node in site.nodes)
    return [group for group in groups if group]
