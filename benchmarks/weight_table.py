"""Results of a benchmark in a file, to which each run adds what is not there yet."""

from __future__ import annotations

import json
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
