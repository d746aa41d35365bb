"""Models whose 4-bit weights are compared, with what scores them and what calibrates them."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import models
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import sounds
from minilm import encode, load_tokenizer, read_sts
from whisper_smollm2 import cross_entropy

Feeds = dict[str, Any]

TOKENS = 512


@dataclasses.dataclass(frozen=True)
class Case:
    """A model.

    Attributes:
        source: Its ONNX file.
        head: The product that stays float; empty for none.
        calibration: Samples.
        count: Windows or pairs that are scored.
        score: Figures of a model file.
    """

    source: Path
    head: str
    calibration: Sequence[Feeds]
    count: int
    score: Callable[[Path], dict[str, float]]


def smollm2(text: Path, count: int, calibrate: int, held_out: bool = False) -> Case:
    """Perplexity of windows from the beginning of a text; windows of its end calibrate.

    Held out are windows between: defaults were chosen by them, not by those that are reported.
    """
    from transformers import AutoTokenizer

    source, gguf = models.smollm2_prefill()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    ids = np.asarray(tokenizer(text.read_text(encoding="utf-8"))["input_ids"], np.int64)
    pieces = ids[: len(ids) // TOKENS * TOKENS].reshape(-1, 1, TOKENS)
    if len(pieces) < count + calibrate:
        raise SystemExit(
            f"{text} has {len(pieces)} windows of {TOKENS} tokens, {count + calibrate} are needed"
        )
    feeds = [{"input_ids": piece, "attention_mask": np.ones_like(piece)} for piece in pieces]

    scored = feeds[-64 - count : -64] if held_out else feeds[:count]

    def score(path: Path) -> dict[str, float]:
        session = open_float(path)
        losses = [
            cross_entropy(session.run(["logits"], f)[0][0, :-1], f["input_ids"][0, 1:])
            for f in scored
        ]
        return {"perplexity": float(np.exp(np.mean(losses)))}

    return Case(source, _maker_of(source, "logits"), feeds[-calibrate:], count, score)


def minilm(sts: Path, train: Path, count: int, calibrate: int) -> Case:
    """Spearman's rho on pairs of STS-B, and the SQNR of sentence vectors against float ones."""
    from scipy.stats import spearmanr

    source, tokenizer_file = models.minilm()
    tokenizer, rows = load_tokenizer(tokenizer_file), read_sts(sts)[:count]
    sentences = [row[5] for row in rows] + [row[6] for row in rows]
    calibration = [encode(tokenizer, [row[5]]) for row in read_sts(train)[:calibrate]]

    def vectors_of(path: Path) -> np.ndarray:
        session, parts = open_float(path), []
        for start in range(0, len(sentences), 32):
            feeds = encode(tokenizer, sentences[start : start + 32])
            hidden, mask = session.run(None, feeds)[0], feeds["attention_mask"]
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
            parts.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
        return np.concatenate(parts)

    reference = vectors_of(source)

    def score(path: Path) -> dict[str, float]:
        vectors = vectors_of(path)
        cosine = (vectors[: len(rows)] * vectors[len(rows) :]).sum(1)
        noise = max(float(np.square(vectors - reference).sum()), 1e-12)
        rho = spearmanr(cosine, [float(row[4]) for row in rows]).statistic
        return {
            "spearman": 100 * float(rho),
            "sqnr_db": float(10 * np.log10(len(sentences) / noise)),
        }

    return Case(source, "", calibration, len(rows), score)


def whisper_decoder(sts: Path, count: int, calibrate: int) -> Case:
    """Words in error of sentences that are spoken, and the SQNR of the logits against float ones.

    The encoder is float; calibrated with sentences that are not scored, as the float decoder
    writes them down.
    """
    texts = sounds.sentences(read_sts(sts), 10**6)[: calibrate + count]
    encoder = ort.InferenceSession(models.whisper_encoder())
    file, vocabulary = models.whisper_decoder()
    states = [encoder.run(None, sounds.spoken(text))[0] for text in texts]
    decoder = Decoder(file)
    feeds = [
        {
            "tokens": np.array([sounds.heard(decoder, state, len(vocabulary))], np.int64),
            "enc": state,
        }
        for state in states
    ]
    scored = range(calibrate, len(texts))
    reference = [decoder.run(None, feeds[i])[0] for i in scored]

    def score(path: Path) -> dict[str, float]:
        session, wrong, total, noise = Decoder(path), 0, 0, 0.0
        for i, exact in zip(scored, reference, strict=True):
            noise += float(np.square(session.run(None, feeds[i])[0] - exact).sum())
            text = sounds.transcribe(session, states[i], vocabulary)
            said = sounds.plain_words(texts[i])
            wrong += sounds.edits(said, sounds.plain_words(text))
            total += len(said)
        signal = sum(float(np.square(exact).sum()) for exact in reference)
        sqnr = float(10 * np.log10(signal / max(noise, 1e-12)))
        return {"wer": 100 * wrong / total, "words": total, "sqnr_db": sqnr}

    return Case(file, _maker_of(file, "logits"), feeds[:calibrate], len(scored), score)


class Decoder:
    """A decoder in two sessions: what depends on `enc` alone is computed once per sentence."""

    def __init__(self, path: Path) -> None:
        """Cut the model of a file where `enc` meets the tokens."""
        model = ir.load(path)
        inputs = {value.name: value for value in model.graph.inputs}
        cut = _made_of(model.graph, inputs["enc"])
        halves = [([inputs["enc"]], cut), ([inputs["tokens"], *cut], list(model.graph.outputs))]
        with tempfile.TemporaryDirectory() as folder:
            for number, (given, wanted) in enumerate(halves):
                graph = ir.convenience.extract(model.graph, given, wanted)
                graph.inputs[:] = [value for value in graph.inputs if value.uses()]
                half = ir.Model(graph, ir_version=model.ir_version)
                ir.save(half, Path(folder) / f"{number}.onnx", external_data=f"{number}.data")
            self._parts = [open_float(Path(folder) / f"{number}.onnx") for number in (0, 1)]
        self._names = [value.name for value in cut]
        self._states: np.ndarray | None = None
        self._cut: Feeds = {}

    def run(self, names: None, feeds: Feeds) -> list[Any]:
        """As a session of the whole model does."""
        before, behind = self._parts
        if feeds["enc"] is not self._states:
            self._states = feeds["enc"]
            made = before.run(self._names, {"enc": self._states})
            self._cut = dict(zip(self._names, made, strict=True))
        return list(behind.run(names, {"tokens": feeds["tokens"]} | self._cut))


def _made_of(graph: ir.Graph, start: ir.Value) -> list[ir.Value]:
    """Values that depend on one input alone, and that others read."""
    known = {start}
    for node in graph:
        inputs = [value for value in node.inputs if value is not None and not _fixed(value)]
        if inputs and all(value in known for value in inputs):
            known |= set(node.outputs)
    return [
        value for node in graph for value in node.outputs
        if value in known and any(not set(use.node.outputs) <= known for use in value.uses())
    ]  # fmt: skip


def _fixed(value: ir.Value) -> bool:
    """Whether it depends on no input."""
    node = value.producer()
    if node is None:
        return value.is_initializer()
    return all(given is None or _fixed(given) for given in node.inputs)


def open_float(path: Path) -> ort.InferenceSession:
    """A session in which products of few bits, too, multiply float32."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _maker_of(source: Path, output: str) -> str:
    """The name of the product that makes an output."""
    (value,) = [value for value in ir.load(source).graph.outputs if value.name == output]
    node = value.producer()
    assert node is not None and node.op_type == "MatMul"
    return node.name or ""
