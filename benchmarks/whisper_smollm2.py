"""Whisper tiny's encoder and SmolLM2-135M's prefill for x86-int8, beside others.

    pip install '.[cpu,zig]' torch transformers accelerate gguf openvino nncf
    python benchmarks/whisper_smollm2.py --json benchmarks/results/whisper_smollm2.json

The encoder takes 30 s of speech: 1500 positions, so that attention weighs more than in any text
encoder, and two convolutions.  Prefill is a decoder-only model reading a prompt of 128 tokens and
filling its cache, what comes before every answer of a language model: RMS norms, rotary positions,
grouped keys and values, gated feed forward, and a head a quarter as large as the rest.  (Whisper's
decoder was not chosen: without its cache nobody runs it, and with it one token is all it reads.)

Peers are those of minilm.py; of SmolLM2 ONNX Runtime's transformer optimizer fuses the norms only
(onnxruntime-genai, which builds such models anew, is not compared).  The convolutions' static
ranges and NNCF are calibrated with spoken commands and with prose, and all are compared with ORT
FP32 on a book read aloud and on further prose.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import models
import numpy as np
import samples
from contenders import Contender, Feeds, ort_contenders, our_contenders
from minilm import PROFILED
from peers import openvino_contenders
from profile_table import Widths, measure_profile
from timing import environment, measure_compile, measure_opening, measure_speed


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with its inputs.

    Attributes:
        name: For tables.
        model: The FP32 ONNX file.
        shape: The input that is timed, in words.
        calibration: Samples; the first is what is timed.
        test: Samples to compare results on.
        model_type: What ONNX Runtime's transformer optimizer takes it for.
        heads: Attention heads.
        widths: Sizes of its matrix products.
        static: Whether something in it needs static ranges.
        eager: The model in the form that ONNX Runtime's transformer optimizer knows best.
        convolutions: Multiply-adds and weights outside of matrix products.
    """

    name: str
    model: Path
    shape: str
    calibration: Sequence[Feeds]
    test: Sequence[Feeds]
    model_type: str
    heads: int
    widths: Widths
    static: bool = False
    eager: Path | None = None
    convolutions: tuple[int, int] = (0, 0)


def whisper() -> Case:
    """The encoder; its convolutions are 80 to 384 and 384 to 384 channels, 3 wide."""
    sizes = (80 * 384 * 3, 384 * 384 * 3)
    calibration = samples.speech("cards/*.wav") + samples.speech("forever/*.wav")
    return Case(
        "whisper", models.whisper_encoder(), "mel 1x80x3000", calibration,
        samples.speech("librivox/*.wav"), "bart", 6, Widths(384, 1536), True,
        models.whisper_encoder(eager=True), (3000 * sizes[0] + 1500 * sizes[1], sum(sizes)),
    )  # fmt: skip


def smollm2() -> Case:
    """Prefill."""
    model, gguf = models.smollm2_prefill()
    prompts = samples.prompts(gguf, 48, 128)
    return Case("smollm2", model, "1x128", prompts[:32], prompts[32:], "qwen3", 9,
                Widths(576, 1536))  # fmt: skip


CASES = {"whisper": whisper, "smollm2": smollm2}


def compare(contenders: Mapping[str, Contender], test: Sequence[Feeds]) -> dict[str, Any]:
    """SQNR of the first output against ORT FP32; of logits also agreement and perplexity."""
    reference = [contenders["ORT FP32"].open(2).run(None, feeds)[0].copy() for feeds in test]
    power = sum(np.square(y, dtype=np.float64).sum() for y in reference)
    result: dict[str, Any] = {}
    print(f"\nOn {len(test)} samples, against ORT FP32:")
    for name, contender in contenders.items():
        if name.startswith("ORT") and "," in name:
            continue  # the same numbers
        session, noise, scores = contender.open(2), 0.0, []
        for feeds, expected in zip(test, reference, strict=True):
            y = session.run(None, feeds)[0]
            noise += np.square(y - expected, dtype=np.float64).sum()
            if "input_ids" in feeds:
                agreement = (y.argmax(-1) == expected.argmax(-1)).mean()
                scores.append((agreement, cross_entropy(y[0, :-1], feeds["input_ids"][0, 1:])))
        entry = {"sqnr_db": float(10 * np.log10(power / noise)) if noise else None}
        if scores:
            agreement, loss = np.mean(scores, axis=0)
            entry |= {"agreement": float(agreement), "perplexity": float(np.exp(loss))}
        result[name] = entry
        values = (f"{key} {value:8.3f}" for key, value in entry.items() if value is not None)
        print(f"  {name:44}{'  '.join(values)}")
    return result


def cross_entropy(logits: np.ndarray, tokens: np.ndarray) -> float:
    """Mean over tokens, in nats; logits [tokens, vocabulary]."""
    logits = logits - logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, tokens[:, None], -1)[:, 0]
    return float((np.log(np.exp(logits).sum(-1)) - chosen).mean())


def _write(samples: Sequence[Feeds], folder: Path) -> Path:
    folder.mkdir()
    for i, feeds in enumerate(samples):
        np.savez(folder / f"{i:03}.npz", **feeds)
    return folder


def measure(case: Case, seconds: float) -> dict[str, Any]:
    print(f"\n=== {case.name}, {case.shape}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        calibration = _write(case.calibration, folder / "calibration") if case.static else None
        compiled = measure_compile(case.model, folder, calibration)
        contenders = ort_contenders(
            case.model, folder, model_type=case.model_type, heads=case.heads,
            hidden=case.widths.hidden, eager=case.eager,
        )  # fmt: skip
        contenders |= our_contenders(case.model, folder, calibration)
        contenders |= openvino_contenders(case.model, case.calibration)
        profiled = {name: contenders[name] for name in PROFILED if name in contenders}
        feeds = case.calibration[0]
        return {
            "compile": compiled,
            "session_ms": measure_opening(contenders, rounds=3),
            "speed": measure_speed(contenders, {case.shape: feeds}, seconds),
            "profile": measure_profile(
                profiled, feeds, case.widths, shape=case.shape, seconds=seconds,
                convolutions=case.convolutions,
            ),
            "accuracy": compare(contenders, case.test),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=CASES, action="append", help="by default both")
    parser.add_argument("--seconds", type=float, default=20.0, help="per thread count")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    names = arguments.model or list(CASES)
    results = {name: measure(CASES[name](), arguments.seconds) for name in names}
    if arguments.json:
        arguments.json.write_text(json.dumps(environment() | results, indent=1) + "\n")


if __name__ == "__main__":
    main()
