"""The table of targets in the README: MiniLM-L6-v2 compiled for every one, run on this CPU.

    pip install '.[cpu,zig]' torch transformers tokenizers scipy
    python benchmarks/targets.py --sts sts-dev.csv --json benchmarks/results/targets.json

A target of another architecture runs from its function bodies here: its accuracy is that of the
target's numbers, its speed says only that a bundle without kernels is usable.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import minilm
import models
from contenders import Bundle, Contender, Stock
from timing import interleave

import qcompiler
from qcompiler.targets.catalog import TARGETS, built_isas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sts", type=Path, required=True, help="dev split of the STS benchmark")
    parser.add_argument("--targets", nargs="+", default=[*TARGETS], choices=[*TARGETS])
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing, for all targets")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    model, tokenizer = models.minilm()
    feeds = minilm.random_inputs((1, 128))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        contenders: dict[str, Contender] = {"ORT FP32": Stock(model)}
        sizes = {"ORT FP32": model.stat().st_size}
        for name in arguments.targets:
            report = qcompiler.compile(model, name, Path(scratch) / name)
            contenders[name] = Bundle(report.bundle)
            sizes[name] = report.bytes_after
        accuracy = minilm.measure_sts(contenders, arguments.sts, tokenizer)
        sessions = {name: contender.open(1) for name, contender in contenders.items()}
        times = interleave(sessions, feeds, arguments.seconds)
    print(f"\n{'':12}{'kernels':14}{'MB':>8}{'STS-B':>8}{'dB':>7}{'1x128 ms':>10}{'speed':>7}")
    for name in contenders:
        kernels = ", ".join(built_isas(TARGETS[name])) if name in TARGETS else ""
        row = {"target": name, "kernels": kernels, "bytes": sizes[name], **accuracy[name],
               "ms": times[name]}  # fmt: skip
        rows.append(row)
        speed = times["ORT FP32"]["median"] / times[name]["median"]
        noise = row["sqnr_db"] or float("inf")
        print(f"{name:12}{kernels or '-':14}{sizes[name] / 1e6:8.1f}{row['spearman']:8.2f}"
              f"{noise:7.1f}{times[name]['median']:10.2f}{speed:7.2f}")  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
