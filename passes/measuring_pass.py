"""What passes have in common that measure what quantizing does to a model."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from qcompiler.passes.insert_qdq import Observer
from qcompiler.passes.known_ranges import KnownRanges
from qcompiler.passes.side_by_side import Runner

__all__ = ["MeasuringPass"]


class MeasuringPass(ir.passes.InPlacePass):
    """A pass that runs a model beside its quantized copy; a subclass has its own `Options`.

    Attributes:
        run: Runs the model on samples; without it nothing is measured, and nothing changes.
        observe: Where static ranges come from.
        options: What to do differently.
    """

    Options: Any

    def __init__(
        self, run: Runner | None = None, observe: Observer | None = None, options: Any = None
    ) -> None:
        super().__init__()
        self.run, self.observe, self.options = run, observe, options or self.Options()

    def carry(self, before: ir.Model, after: ir.Model) -> None:
        """Let ranges that were observed of one model hold for another, see `KnownRanges.carry`."""
        if isinstance(self.observe, KnownRanges):
            self.observe.carry(before, after)
