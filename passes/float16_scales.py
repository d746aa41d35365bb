"""Scales of groups in float16, which has fewer bits for numbers below 6.1e-05.

1. A column of weights all of whose scales are small would be another: its op stays in float32.
2. A few small scales among larger ones cost little of the column's sum: a note says how much.

Part of `convert_float16`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.ir import dialect
from qcompiler.ir.decisions import add_note
from qcompiler.ir.graph import constant

__all__ = ["note_small_scales", "unfit_scales"]

_SMALLEST = float(np.finfo(np.float16).tiny)
_FLOOR = 48.0
"""dB that a column must keep: far above what 4 bits leave of it, and two bits of float16 below
what its scales have."""


def unfit_scales(node: ir.Node) -> str | None:
    """Why an op of ours stays in float32, if rounding its scales would change a column (1)."""
    found = _small_scales(node)
    if found is None or found[1] >= _FLOOR:
        return None
    return f"float32: {_said(*found)}"


def note_small_scales(nodes: Iterable[ir.Node]) -> None:
    """Say of ops that become float16 what that costs their smallest scales (2)."""
    for node in nodes:
        if (found := _small_scales(node)) is not None:
            add_note(node, _said(*found))


def _said(smallest: float, kept: float) -> str:
    return (
        f"its scales are as small as {smallest:.3g}, of which float16 has fewer bits: "
        f"{kept:.0f} dB of a column are kept"
    )


def _small_scales(node: ir.Node) -> tuple[float, float] | None:
    """The smallest scale, and the dB that the worst column keeps; None where none is small."""
    op = dialect.OPS.get(node.op_type) if dialect.is_ours(node.domain) else None
    if op is None or not op.follows or "ws" not in op.inputs:
        return None
    scales: NDArray[np.float32] | None = constant(node.inputs[op.inputs.index("ws")])
    if scales is None or scales.dtype != np.float32:
        return None
    magnitudes = np.abs(scales[scales != 0])
    if not magnitudes.size or magnitudes.min() >= _SMALLEST:
        return None
    with np.errstate(over="ignore"):
        lost = scales.astype(np.float16).astype(np.float64) - scales
    energy = np.square(scales, dtype=np.float64).sum(0)
    noise = np.square(lost).sum(0)[energy > 0] / energy[energy > 0]
    return float(magnitudes.min()), float(-10 * np.log10(max(noise.max(), 1e-30)))
