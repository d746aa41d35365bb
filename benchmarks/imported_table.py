"""The results of imported.py as a table: python benchmarks/imported_table.py results/imported.json.

Ratios are the time of the bundle over that of its source, of medians and of fastest runs: below 1
the bundle is faster.  Where the source's own sums saturate, times and ratios by right ones follow
those by wrong ones; agreement is with what the source means, exact sums.  In brackets, what the
bundle is from function bodies alone, and what the source is with its vectors of floats moved by a
last bit: where that is as low as the bundle, nothing that adds floats in another order is nearer.
Layers are those that kernels compute, ONNX Runtime's integers, bodies and floats.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HEAD = (
    "model", "layers", "bundle (bodies), dB", "source as it stands (last bits moved), dB",
    "FP32 to bundle (to source), dB",
    "1 thread: source (exact), bundle, ms", "ratio (of fastest)", "2 threads", "ratio",
)  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    """Those of one model."""
    if "error" in row:
        return [row["model"], row["error"]] + [""] * (len(HEAD) - 2)
    found_db = {n: v["sqnr_db"] for n, v in row.items() if isinstance(v, dict) and "sqnr_db" in v}
    agreement = {name: f"{decibels:.1f}" for name, decibels in found_db.items()}
    to_floats = [agreement.get(f"fp32_to_{name}") for name in ("bundle", "source")]
    floats = "" if None in to_floats else f"{to_floats[0]} ({to_floats[1]})"
    layers = row.get("layers", {})
    counts = ", ".join(str(layers.get(who, 0)) for who in ("kernel", "qdq", "body", "float"))
    ours, theirs = agreement["bundle"], agreement["source_as_it_comes"]
    if bodies := agreement.get("bundle_without_kernels"):
        ours += f" ({bodies})"
    if moved := agreement.get("source_by_last_bits"):
        theirs += f" ({moved})"
    found = [row["model"], counts, ours, theirs, floats]
    for threads in ("1", "2") if "ms" in row else ():
        plain = row["ms"][threads]
        right = row.get("ms_with_exact_sums", {}).get(threads)
        times = [plain["source"], *([right["source"]] if right else []), plain["bundle"]]
        found.append(", ".join(f"{time:.1f}" for time in times))
        found.append(", ".join(
            f"{kind['ratio']:.2f} ({kind['ratio_of_fastest']:.2f})"
            for kind in (plain, right) if kind
        ))  # fmt: skip
    return found + [""] * (len(HEAD) - len(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    content = json.loads(parser.parse_args().file.read_text())
    rows = [HEAD, ["---", *["--:"] * (len(HEAD) - 1)], *map(cells, content["rows"])]
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


if __name__ == "__main__":
    main()
