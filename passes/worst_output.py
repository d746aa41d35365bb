"""What rounding does to the worst output of a model: some layers, and some of the ops between them.

Part of `keep_sensitive`.  Ops between layers hand on integers, too, where that saves conversions
(`join_integers`), and what they round adds to the noise: in the text detector of PP-OCRv4, whose
layers alone leave its result at 21.5 dB, they take it to 18.0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import onnx_ir as ir

from qcompiler.ir.decisions import drop_plan, keep_float, operand_plan_of
from qcompiler.ir.graph import every_node
from qcompiler.passes.insert_qdq import Observer
from qcompiler.passes.join_integers import JoinIntegers, links_of
from qcompiler.passes.side_by_side import Runner, output_errors, quantized_copy

__all__ = ["WorstOutput"]


class WorstOutput:
    """Runs copies of a planned model.

    Attributes:
        heard: What came of each run so far, SQNR in dB.
    """

    def __init__(
        self,
        model: ir.Model,
        run: Runner,
        observe: Observer | None,
        tell: Callable[[str, float], None],
        most: int,
    ) -> None:
        """Nothing is run yet.

        Args:
            model: It is not changed.
            run: Runs a copy on samples.
            observe: Where static ranges come from.
            tell: Hears of each run, and which share of `most` that is.
            most: So many runs are planned.
        """
        self.model, self._run, self._observe = model, run, observe
        self._tell, self._most = tell, most
        self.heard: list[float] = []

    def noise(self, layers: Collection[str], links: Collection[str]) -> float:
        """Of the worst output, as a part of its power; NaN where that could not be measured.

        Args:
            layers: Names of the planned nodes that are quantized, no others.
            links: Names of the ops between them that may hand on integers.
        """
        worst = self._sqnr(self._planned(layers, links))
        self.heard.append(worst)
        what = f"{len(layers)} layer{'s' * (len(layers) != 1)}"
        what += f" and {len(links)} between them" if links else ""
        run = f"run {len(self.heard)} of at most {self._most}, {what} quantized: {worst:.1f} dB"
        self._tell(run, len(self.heard) / self._most)
        return math.pow(10, -worst / 10)

    def links(self, layers: Collection[str]) -> list[str]:
        """Names of the ops that would read integers between these layers, products among them."""
        planned = self._planned(layers, None)
        return [node.name or "" for node in planned.graph if operand_plan_of(node)]

    def _planned(self, layers: Collection[str], links: Collection[str] | None) -> ir.Model:
        planned = self.model.clone()
        for node in every_node(planned.graph):
            # Both operands of a product of activations are planned before: it is one in between.
            joins = operand_plan_of(node) is not None and (links is None or node.name in links)
            if (node.name or "") not in layers and not joins:
                drop_plan(node)
        for node in links_of(planned.graph):
            if links is not None and node.name not in links:
                keep_float(node, "it is not looked at")
        JoinIntegers()(planned)
        return planned

    def _sqnr(self, planned: ir.Model) -> float:
        joined, found = output_errors(self.model, quantized_copy(planned, self._observe))
        if not found:  # nothing that it makes is of floats
            return math.nan
        names: Sequence[str] = [name for means in found for name in means.names]
        rows = self._run(joined, names)
        return min(means.overall(rows) for means in found) if rows else math.nan
