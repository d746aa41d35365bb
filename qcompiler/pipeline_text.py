"""Pipelines as text, as `--pipeline` takes them.

    canonicalize..insert-qdq, fold-qdq                 passes in the order they run
    smooth-activations{alpha=0.25,0.5 worth=1}         with options, apart by spaces or commas
    ..                                                 all passes of the target

A value without a name belongs to the list before it; options after a range belong to its last pass.
`+` does what a comma does, and `smooth-quant` is another name of smooth-activations.  On a model of
an older opset than they write, canonicalize runs before the first of them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence

from qcompiler.ir.errors import OptionError, did_you_mean

__all__ = ["ALIASES", "PassText", "parse_pipeline", "with_aliases"]


ALIASES = {"smooth-quant": "smooth-activations"}
"""Names that passes have elsewhere."""


@dataclasses.dataclass(frozen=True)
class PassText:
    """One pass of a text.

    Attributes:
        name: What the pipeline calls it.
        options: By name, the values written for it.
    """

    name: str
    options: Mapping[str, list[str]]


def parse_pipeline(text: str, known: Sequence[str]) -> list[PassText]:
    """The passes of a text, ranges written out.

    Args:
        text: See the head of this file.
        known: Names of all passes there are, in their usual order.

    Raises:
        OptionError: A name that is not known, braces that do not match, or nothing where a pass or
            a value is expected.
    """
    found: list[PassText] = []
    for item in _split(text):
        name, braced, inside = item.partition("{")
        name = name.strip()
        if not name:
            where = f"before {item}" if item else "at an end, or between two commas"
            raise OptionError(f"pipeline {text!r}: the name of a pass is missing {where}")
        names = _names(name, known)
        if braced and not name.rpartition("..")[2].strip():
            raise OptionError(f"pipeline {text!r}: options belong to a pass, not to {name!r}")
        options = _options(names[-1], inside.removesuffix("}"))
        found += [PassText(part, {}) for part in names[:-1]]
        found.append(PassText(names[-1], options))
    return found


def _split(text: str) -> list[str]:
    """The parts between commas or pluses that are outside of braces."""
    items, depth = [""], 0
    for letter in text:
        depth += (letter == "{") - (letter == "}")
        if depth not in (0, 1):
            problem = "a '{' inside of another" if depth > 1 else "a '}' that nothing opens"
            raise OptionError(f"pipeline {text!r}: {problem}")
        if letter in ",+" and not depth:
            items.append("")
        elif items[-1].rstrip().endswith("}") and letter == ".":
            raise OptionError(
                f"pipeline {text!r}: a range has options at its end only: put a comma after "
                f"{items[-1].strip()!r}, and begin the range with the pass that comes next"
            )
        elif items[-1].rstrip().endswith("}") and not letter.isspace():
            raise OptionError(f"pipeline {text!r}: a comma is missing after {items[-1].strip()!r}")
        else:
            items[-1] += letter
    if depth:
        raise OptionError(f"pipeline {text!r}: a '{{' that nothing closes")
    return [item.strip() for item in items]


def _options(name: str, text: str) -> dict[str, list[str]]:
    options: dict[str, list[str]] = {}
    values: list[str] | None = None
    for word in re.split(r"[,\s]+", text.strip()) if text.strip() else []:
        key, named, value = word.partition("=")
        if not named and values is None:
            raise OptionError(f"{name}: {word!r} is not OPTION=VALUE")
        if named:
            key = key.replace("-", "_")
            if key in options:
                raise OptionError(f"{name}: {key} is given twice")
            values = options[key] = []
        assert values is not None
        values.append(value if named else word)
    return options


def with_aliases(names: Collection[str]) -> list[str]:
    """Names of passes, and the other names of those."""
    return [*names, *(alias for alias, name in ALIASES.items() if name in names)]


def _names(text: str, known: Sequence[str]) -> Sequence[str]:
    """One name, or all from one to another: `a..b`, `a..`, `..b` or `..`."""
    first, ranges, last = (ALIASES.get(p.strip(), p.strip()) for p in text.partition(".."))
    for name in (first, last):
        if name and name not in known:
            hint = did_you_mean(name, with_aliases(known)) or f"; one of {', '.join(known)}"
            raise OptionError(f"no pass {name!r}{hint}")
    if not ranges:
        return [first]
    start = known.index(first) if first else 0
    end = known.index(last) if last else len(known) - 1
    if start > end:
        raise OptionError(f"{text}: {last} comes before {first}; turn it round")
    return known[start : end + 1]
