"""4-bit weights of three models, rounded in several ways: scores, time and memory.

    pip install '.[cpu]' torch transformers accelerate gguf tokenizers scipy onnxsim
    python benchmarks/weights.py --text WIKITEXT2 --sts STS_DEV --train STS_TRAIN --json FILE

fills the whole table of docs/weights.md, ours and all peers.  Each figure is measured by a process
of its own and written down at once, so that the command goes on where it was stopped.  `--model`,
`--group`, `--kind` and `--only` choose some.  A figure that takes longer than `--limit` minutes of
processor is none, and the table says so.

SmolLM2 is scored by its perplexity on windows of 512 tokens from the beginning of WikiText-2's
validation part (CC BY-SA 3.0), and calibrated with windows of its end.  MiniLM is scored on the
dev split of the STS benchmark, and calibrated with sentences of the training split.  The decoder of
Whisper tiny.en is scored on sentences of that split that espeak-ng says.  The matrices
of all layers are rounded; embeddings, and the head that shares its table with one, stay float; so
do activations, for every contender, so that nothing but the weights differs.  ONNX Runtime's
quantizers, onnxsim's and llama.cpp's are the peers.

The weights of SmolLM2 once lay on a grid of 4 bits in groups of 32 with a zero point that is a
float, so that groups of 32 are easy, above all with such zero points (ONNX Runtime's HQQ).
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from weight_cases import Case, minilm, smollm2, whisper_decoder
from weight_cells import measure
from weight_kinds import KINDS, WAYS
from weight_peers import peers_of
from weight_table import Table

GROUPS = {"smollm2": (32, 64, 128, 0), "minilm": (64,), "whisper": (64,)}
"""Weights per scale of each model; 0: one scale per channel."""

COUNTS = {"smollm2": (8, 8), "minilm": (400, 64), "whisper": (56, 12)}
"""Windows, pairs or sentences that are scored, and that calibrate."""

WANTED = {"smollm2": ("text",), "minilm": ("sts", "train"), "whisper": ("sts",)}
"""The files that a model is scored and calibrated with."""


def case_of(model: str, arguments: argparse.Namespace) -> Case:
    """A model with its samples."""
    count, calibrate = counts_of(model, arguments)
    if model == "smollm2":
        return smollm2(arguments.text, count, calibrate, held_out=arguments.held_out)
    if model == "whisper":
        return whisper_decoder(arguments.sts, count, calibrate)
    return minilm(arguments.sts, arguments.train, count, calibrate)


def counts_of(model: str, arguments: argparse.Namespace) -> tuple[int, int]:
    """How much is scored, and how much calibrates."""
    count, calibrate = COUNTS[model]
    return arguments.count or count, arguments.calibrate or calibrate


def contenders(group: int, kinds: list[str]) -> Iterator[str]:
    """The names of all, ours first, in groups of a size."""
    for kind in kinds:
        yield from (f"{way}, {kind}" for way in WAYS[kind])
    yield from peers_of(group)


def in_a_process(
    given: list[str], limit: float, model: str, group: int, name: str
) -> dict[str, Any]:
    """Figures that another process measures: what it leaves in memory, or dies of, is its own."""
    command = [sys.executable, __file__, *given, "--model", model, "--cell", f"{group}|{name}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == -signal.SIGXCPU:
        return {"error": f"TimeoutError: stopped after {limit:g} minutes of processor"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"error": f"the process ended with {done.returncode}"}
    return dict(json.loads(lines[-1]))


def fill(model: str, arguments: argparse.Namespace, given: list[str]) -> None:
    """Measure what is not there yet of one model."""
    if missing := [name for name in WANTED[model] if getattr(arguments, name) is None]:
        raise SystemExit(f"{model} wants --{' and --'.join(missing)}")
    count, calibrate = counts_of(model, arguments)
    facts = {"count": count, "calibrate": calibrate}
    facts |= {"held_out": True} if arguments.held_out else {}
    table = Table(arguments.json, model, facts, arguments.only or ())
    measured = partial(in_a_process, given, arguments.limit, model)
    table.note("float", None, partial(measured, 0, "float"))
    for group in arguments.group or GROUPS[model]:
        for name in contenders(group, arguments.kind or list(KINDS)):
            table.note(name, group, partial(measured, group, name))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="append", choices=list(GROUPS), help="default all")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--sts", type=Path)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--count", type=int, help="windows or pairs to score")
    parser.add_argument("--calibrate", type=int, help="windows or sentences to calibrate on")
    parser.add_argument("--group", type=int, action="append", help="0: per channel; default all")
    parser.add_argument("--only", action="append", help="contenders whose names begin so")
    parser.add_argument("--kind", action="append", choices=KINDS, help="of groups; default all")
    parser.add_argument("--limit", type=float, default=20, help="minutes of processor a figure")
    parser.add_argument("--held-out", action="store_true", help="score windows between those")
    parser.add_argument("--json", type=Path, help="results are added to those that are there")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    arguments = parser().parse_args()
    logging.disable(logging.WARNING)
    if arguments.cell is not None:  # the last --model is that of the process
        seconds = int(60 * arguments.limit)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 10))
        group, _, name = arguments.cell.partition("|")
        found = measure(case_of(arguments.model[-1], arguments), int(group), name)
        print("\n" + json.dumps(found))  # peers leave lines unfinished
        return
    for model in arguments.model or GROUPS:
        fill(model, arguments, sys.argv[1:])


if __name__ == "__main__":
    main()
