"""Sounds to run networks on: sentences that espeak-ng says, and chords that are added up here."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import wave

import numpy as np
from contenders import Feeds
from samples import RATE

PROMPT = [50257, 50362]
"""Of Whisper tiny.en: start of transcript, no timestamps."""
END = 50256


def sentences(rows: list[list[str]], words: int) -> list[str]:
    """Sentences of letters alone, of 8 to 16 words each, until there are so many words."""
    found: list[str] = []
    for text in dict.fromkeys(row[5] for row in rows):
        plain = text.strip().rstrip(".")
        if re.fullmatch(r"[A-Za-z ]+", plain) and 8 <= len(plain.split()) <= 16:
            found.append(plain)
        if sum(len(sentence.split()) for sentence in found) >= words:
            break
    return found


def spoken(text: str, voice: str = "en-us") -> Feeds:
    """The log-mel spectrogram of a sentence that espeak-ng says: mel [1, 80, 3000]."""
    from scipy.signal import resample_poly
    from transformers import WhisperFeatureExtractor

    command = ["espeak-ng", "-v", voice, "-s", "145", "--stdout", text]
    said = subprocess.run(command, check=True, capture_output=True).stdout
    with wave.open(io.BytesIO(said)) as file:
        # It writes to a pipe, whose length its header does not know.
        samples = np.frombuffer(file.readframes(1 << 26), np.int16) / np.float32(32768)
        rate = file.getframerate()
    # Without a moment of silence the first word is often lost.
    silence = np.zeros(RATE // 2, np.float32)
    clip = np.concatenate([silence, resample_poly(samples, RATE, rate).astype(np.float32)])
    extractor = WhisperFeatureExtractor(feature_size=80)
    return {"mel": extractor(clip, sampling_rate=RATE, return_tensors="np").input_features}


def can_speak() -> bool:
    """Whether espeak-ng is installed."""
    return shutil.which("espeak-ng") is not None


def heard(decoder: object, states: np.ndarray, words: int) -> list[int]:
    """The likeliest tokens one by one, from an encoder's result [1, 1500, 384]."""
    tokens = list(PROMPT)
    while len(tokens) < 100:
        feeds = {"tokens": np.array([tokens], np.int64), "enc": states}
        logits = decoder.run(None, feeds)[0][0, -1, : words + 1]  # type: ignore[attr-defined]
        best = int(np.argmax(logits))
        if best == END:
            break
        tokens.append(best)
    return tokens


def transcribe(decoder: object, states: np.ndarray, vocabulary: list[bytes]) -> str:
    """The likeliest text."""
    tokens = heard(decoder, states, len(vocabulary))
    return b"".join(vocabulary[token] for token in tokens[len(PROMPT) :]).decode(errors="replace")


def plain_words(text: str) -> list[str]:
    """Words without case and punctuation."""
    return re.sub(r"[^a-z ]", "", text.lower()).split()


def edits(said: list[str] | str, heard: list[str] | str) -> int:
    """Insertions, deletions and replacements from one to the other (Levenshtein)."""
    row = list(range(len(heard) + 1))
    for i, left in enumerate(said, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(heard, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


def chord(rng: np.random.Generator, count: int = 43844, rate: int = 22050) -> np.ndarray:
    """Notes of a few harmonics that come and fade: [1, count, 1]."""
    time, sound = np.arange(count) / rate, np.zeros(count)
    for _ in range(int(rng.integers(2, 7))):
        pitch, start = 440 * 2 ** ((int(rng.integers(40, 80)) - 69) / 12), rng.uniform(0, 1.5)
        envelope = np.where(time >= start, np.exp(-(time - start) * rng.uniform(1, 4)), 0)
        for harmonic in range(1, 6):
            phase = 2 * np.pi * harmonic * pitch * time
            sound += envelope * np.sin(phase) * rng.uniform(0.2, 1) / harmonic**1.5
    sound += rng.normal(0, 0.003, count)
    return (0.6 * sound / np.abs(sound).max()).astype(np.float32).reshape(1, count, 1)
