"""Results of a benchmark in a file, to which each run adds what is not there yet.

    python benchmarks/weight_table.py benchmarks/results/weights.json

prints them as the tables of docs/weights.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from timing import environment


class Table:
    """Figures of one model, by group size and contender.

    Attributes:
        only: Contenders whose names begin so are measured; all if it is empty.
    """

    def __init__(
        self, path: Path | None, model: str, facts: dict[str, Any], only: Sequence[str] = ()
    ) -> None:
        """Read what was measured before.

        Raises:
            SystemExit: It was measured with other facts, such as another number of samples.
        """
        self.only = tuple(only)
        self._path, self._models = path, dict[str, Any]()
        if path and path.exists():
            self._models = json.loads(path.read_text())
        self._results = self._models.setdefault(model, {"environment": environment(), **facts})
        before = {key: self._results.get(key) for key in facts}
        if before != facts:
            raise SystemExit(f"{path} was measured with {before}, not with {facts}")

    def note(self, name: str, group: int | None, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a contender, unless that was done; group 0 is one scale per channel."""
        asked = not self.only or name.startswith(self.only)
        heading = {None: "all", 0: "per channel"}.get(group, f"group {group}")
        table = self._results.setdefault(heading, {})
        if not asked or name in table:
            return
        table[name] = measure()
        print(f"{heading:>11}  {name:40}", json.dumps(table[name]), flush=True)
        if self._path:
            self._path.write_text(json.dumps(self._models, indent=1) + "\n")


COLUMNS = ("nearest, max", "hqq", "awq", "gptq")
PEERS = ("ORT", "onnxsim", "llama.cpp")
SCORES = ("perplexity", "spearman", "wer", "sqnr_db")


def markdown(results: dict[str, Any]) -> str:
    """The tables of one model: ours by group and storage, and those of others."""
    ours = ["| group | stored as | bits | nearest | `hqq` | `awq` | `gptq` |", "|---|" + "---|" * 6]
    theirs = ["| group | peer | bits | |", "|---|---|---|---|"]
    for heading, table in results.items():
        if not isinstance(table, dict) or heading in ("environment", "all"):
            continue
        group = heading.removeprefix("group ").removeprefix("per ")
        kinds = dict.fromkeys(
            name.removeprefix(f"{rounding}, ")
            for rounding in COLUMNS
            for name in table
            if name.startswith(f"{rounding}, ")
        )
        for kind in kinds:
            cells = [table.get(f"{rounding}, {kind}", {}) for rounding in COLUMNS]
            bits = max(cell.get("bits", 0) for cell in cells)
            figures = " | ".join(_figures(cell) for cell in cells)
            ours.append(f"| {group} | {kind} | {bits:.1f} | {figures} |")
        for name, cell in table.items():
            if name.startswith(PEERS):
                bits = f"{cell['bits']:.1f}" if "bits" in cell else ""
                theirs.append(f"| {group} | {name} | {bits} | {_figures(cell)} |")
    return "\n".join([*ours, "", *theirs])


def _figures(cell: dict[str, Any]) -> str:
    """Its scores, or why there are none."""
    if "error" in cell:
        kind, _, why = str(cell["error"]).partition(": ")
        return f"{kind}: {why.rpartition('] ')[2][:70]}".replace(" || ", " or ").strip(" |")
    return ", ".join(
        f"{cell[score]:.1f} dB" if score == "sqnr_db" else f"{cell[score]:.2f}"
        for score in SCORES
        if score in cell
    )


if __name__ == "__main__":
    for model, results in json.loads(Path(sys.argv[1]).read_text()).items():
        print(f"{model}: float {_figures(results.get('all', {}).get('float', {}))}\n")
        print(markdown(results), end="\n\n")
