"""MiniLM-L6-v2 for x86-int8: speed, where it goes, accuracy and cost of compiling, beside others.

    pip install '.[cpu,zig]' torch transformers tokenizers scipy
    python benchmarks/minilm.py --sts sts-dev.csv --json benchmarks/results/minilm.json

Peers: ORT in FP32 and ORT's dynamic INT8 (per channel, MatMul and Attention), each as exported,
after onnxruntime.transformers.optimizer ("optimized"), and with the SkipLayerNormalization fusion
off (it is slower than what it replaces on this model); where openvino and nncf are installed also
OpenVINO in FP32, at its default precision, and NNCF's INT8 (transformer preset, calibrated with 300
sentences).  Of the export by torch.export, which everyone else is given, the optimizer fuses GELU
and SkipLayerNormalization only; so it is given one by TorchScript with attention spelled out, of
which it fuses attention and the embeddings too.  Sessions run in turn; the idle threads do not
spin.  `--sts` and `--train` are splits of the STS benchmark (tab separated, score and two sentences
in columns 5 to 7).
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import models
import numpy as np
from contenders import Contender, Feeds, ort_contenders, our_contenders
from peers import openvino_contenders
from profile_table import Widths, measure_profile
from timing import environment, measure_compile, measure_opening, measure_speed

SHAPES = ((1, 16), (1, 128), (8, 128))
HEADS, WIDTHS = 12, Widths(hidden=384, feed_forward=1536)
PROFILED = ("ORT FP32", "ORT dynamic INT8", "OpenVINO default", "OpenVINO INT8 (NNCF)",
            "qcompiler x86-int8", "qcompiler, float32 attention")  # fmt: skip


def random_inputs(shape: tuple[int, int]) -> Feeds:
    """Tokens, none of them padding."""
    tokens = np.random.default_rng(0).integers(1000, 20000, shape)
    return {"input_ids": tokens, "attention_mask": np.ones(shape, np.int64)}


def read_sts(path: Path) -> list[list[str]]:
    """The rows of a split of the STS benchmark."""
    with path.open(encoding="utf-8") as file:
        return list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def load_tokenizer(path: Path) -> Any:
    """The model's tokenizer, padding to the longest and cutting at 128."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding()
    return tokenizer


def encode(tokenizer: Any, sentences: list[str]) -> Feeds:
    """The model's inputs for a batch of sentences."""
    encoded = tokenizer.encode_batch(sentences)
    return {
        "input_ids": np.array([e.ids for e in encoded], np.int64),
        "attention_mask": np.array([e.attention_mask for e in encoded], np.int64),
    }


def optional_peers(model: Path, tokenizer_file: Path, train: Path | None) -> dict[str, Contender]:
    """OpenVINO's, if there is something to calibrate NNCF with."""
    if train is None:
        print("without OpenVINO: --train gives no sentences to calibrate with")
        return {}
    tokenizer = load_tokenizer(tokenizer_file)
    sentences = [row[5] for row in read_sts(train)[:300]]
    return openvino_contenders(model, [encode(tokenizer, [sentence]) for sentence in sentences])


def measure_sts(
    contenders: Mapping[str, Contender], sts: Path, tokenizer_file: Path
) -> dict[str, Any]:
    """Spearman's rho on STS-B, and the SQNR of the sentence vectors against ORT FP32."""
    from scipy.stats import spearmanr

    rows, tokenizer = read_sts(sts), load_tokenizer(tokenizer_file)
    scores = [float(row[4]) for row in rows]
    sentences = [row[5] for row in rows] + [row[6] for row in rows]
    order = np.argsort([len(s) for s in sentences])
    result: dict[str, Any] = {}
    reference = None
    print(f"\nSTS-B, {len(rows)} pairs:")
    for name, contender in contenders.items():
        if name.startswith("ORT") and "," in name:
            continue  # the same numbers
        session, vectors = contender.open(2), np.zeros((len(sentences), 384))
        for start in range(0, len(order), 32):
            index = order[start : start + 32]
            feeds = encode(tokenizer, [sentences[i] for i in index])
            hidden, mask = session.run(None, feeds)[0], feeds["attention_mask"]
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
            vectors[index] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        reference = vectors if reference is None else reference
        cosine = (vectors[: len(rows)] * vectors[len(rows) :]).sum(1)
        noise = np.square(vectors - reference).sum()
        entry = {
            "spearman": 100 * float(spearmanr(cosine, scores).statistic),
            "sqnr_db": float(10 * np.log10(len(sentences) / noise)) if noise else None,
        }
        result[name] = entry
        noise_text = "" if entry["sqnr_db"] is None else f"  SQNR {entry['sqnr_db']:.1f} dB"
        print(f"  {name:44}{entry['spearman']:9.2f}{noise_text}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sts", type=Path, help="dev split of the STS benchmark")
    parser.add_argument("--train", type=Path, help="train split, to calibrate NNCF with")
    parser.add_argument("--seconds", type=float, default=8.0, help="per shape and thread count")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    model, tokenizer = models.minilm()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        compiled = measure_compile(model, folder)
        contenders = ort_contenders(
            model,
            folder,
            model_type="bert",
            heads=HEADS,
            hidden=WIDTHS.hidden,
            eager=models.minilm(eager=True)[0],
        )
        contenders |= our_contenders(model, folder)
        contenders |= optional_peers(model, tokenizer, arguments.train)
        inputs = {f"{batch}x{tokens}": random_inputs((batch, tokens)) for batch, tokens in SHAPES}
        profiled = {name: contenders[name] for name in PROFILED if name in contenders}
        content = {
            **environment(),
            "compile": compiled,
            "session_ms": measure_opening(contenders),
            "speed": measure_speed(contenders, inputs, arguments.seconds),
            "profile": measure_profile(
                profiled, inputs["1x128"], WIDTHS, shape="1x128", seconds=arguments.seconds
            ),
            "sts": measure_sts(contenders, arguments.sts, tokenizer) if arguments.sts else None,
        }
    if arguments.json:
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
