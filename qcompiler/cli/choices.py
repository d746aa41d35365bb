"""Which kernels were chosen and on what grounds, in words for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.text import Text

from qcompiler.cli.figures import FigureTable, span

__all__ = ["every_choice", "grounds"]

_CANDIDATES = {"kernel": "our kernel", "ort": "ORT's int8", "float": "float"}


def every_choice(choices: Mapping[str, Any]) -> FigureTable:
    """One row per site, with the time of each candidate; of equal sites only the first."""
    table = FigureTable("Site", "Chosen", *(f">{name}" for name in _CANDIDATES.values()), "From",
                        droppable=["From"])  # fmt: skip
    seen = set[tuple[str, str]]()
    for site in choices["sites"]:
        if (site["site"], site["choice"]) in seen:
            continue
        seen.add((site["site"], site["choice"]))
        costs = site["costs"] or {"times": {}, "source": ""}
        times = (_mean(costs["times"].get(name)) for name in _CANDIDATES)
        table.add_row(
            site["site"], _CANDIDATES[site["choice"]], *times, Text(costs["source"], "dim")
        )
    return table


def grounds(choices: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the cost model is off by, and how the whole did."""
    rows = []
    for time in choices["whole"]:
        model, bundle = span(time["model"] / 1e3), span(time["bundle"] / 1e3)
        threads = f"{time['threads']} thread{'s' if time['threads'] > 1 else ''}"
        rows.append((f"Whole, {threads}", f"{model} → {bundle}"))
    errors = choices["model_error"]
    if errors:
        listed = ", ".join(f"{_CANDIDATES[name]} {100 * off:.0f}%" for name, off in errors.items())
        rows.append(("Cost model", f"off by {listed} (median)"))
    return rows


def _mean(times: list[float] | None) -> str:
    if not times:
        return ""
    return span(1e-6 * math.exp(sum(map(math.log, times)) / len(times)))
