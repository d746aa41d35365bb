"""What was chosen in one compilation, as the manifest keeps it: enough to make it again."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcompiler.bundle import MANIFEST
from qcompiler.ir.errors import OptionError, cannot_read
from qcompiler.ir.sites import CANDIDATES, Candidate, Choice, Costs
from qcompiler.timing.whole import WholeTime

__all__ = ["Record"]


@dataclasses.dataclass(frozen=True)
class Record:
    """Choices and what they were made on.

    Attributes:
        sites: One per node that could have been quantized.
        lost: Why nothing is quantized and no kernel of ours computes anything, where that is so.
        whole: The bundle against its model; empty where it was not timed.
        model_error: By how much the cost model was off, see `model_error`.
        busy: Whether others kept the cores busy while times were taken that a choice was made on.
    """

    sites: tuple[Choice, ...] = ()
    lost: str | None = None
    whole: tuple[WholeTime, ...] = ()
    model_error: Mapping[Candidate, float] = dataclasses.field(default_factory=dict)
    busy: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        sites = [
            {"node": c.node, "site": c.site, "choice": c.candidate, "why": c.why,
             "costs": c.costs and c.costs.to_dict()} for c in self.sites
        ]  # fmt: skip
        whole = [dataclasses.asdict(time) for time in self.whole]
        errors = dict(self.model_error)
        return {"sites": sites, "lost": self.lost, "whole": whole, "model_error": errors,
                "busy": self.busy}  # fmt: skip

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Record:
        """A record out of what `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: Something else was given.
        """
        sites = []
        for entry in content["sites"]:
            if entry["choice"] not in CANDIDATES:
                raise ValueError(f"unknown choice {entry['choice']!r}")
            costs = entry["costs"] and Costs.from_dict(entry["costs"])
            texts = (entry["node"], entry["site"], entry["choice"], entry["why"])
            sites.append(Choice(*texts, costs))
        whole = tuple(WholeTime(**entry) for entry in content["whole"])
        if not isinstance(content["lost"], str | None):
            raise ValueError(f"lost is {content['lost']!r}, not a text")
        errors, busy = dict(content["model_error"]), content.get("busy", False) is True
        return cls(tuple(sites), content["lost"], whole, errors, busy)

    @classmethod
    def read(cls, path: str | os.PathLike[str], target: str) -> Record:
        """The record of a bundle, or of a manifest's file.

        Raises:
            OptionError: There is none there, or it was made for another target.
        """
        file = Path(path)
        file = file / MANIFEST if file.is_dir() else file
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            made_for, choices = content["target"], content["choices"]
            record = None if choices is None else cls.from_dict(choices)
        except OSError as error:
            raise OptionError(cannot_read("choices", file, error, "a bundle")) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            # A UnicodeDecodeError holds all the bytes.
            reason = "no text" if isinstance(error, UnicodeDecodeError) else repr(error)
            raise OptionError(f"{file} holds no choices that can be read ({reason})") from error
        if made_for != target:
            raise OptionError(f"the choices in {file} are for {made_for}, not for {target}")
        if record is None:
            raise OptionError(
                f"{file} holds no choices: its bundle was made with passes of its own"
            )
        return record
