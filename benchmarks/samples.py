"""Inputs that are fit to calibrate and to compare with: read speech and English prose.

Speech is what pocketsphinx (BSD) is tested with, prose the documentation inside Python itself.
"""

from __future__ import annotations

import pydoc_data.topics
import wave
from pathlib import Path

import numpy as np
from contenders import Feeds
from packages import package

POCKETSPHINX = "pocketsphinx==5.1.1"
RATE = 16_000


def speech(pattern: str) -> list[Feeds]:
    """Log-mel spectrograms, mel [1, 80, 3000], of the recordings that match a pattern.

    "cards/*.wav" and "forever/*.wav" are spoken commands, "librivox/*.wav" a book read aloud.
    """
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=80)
    (root,) = package(POCKETSPHINX, source=True).iterdir()
    files = sorted((root / "test" / "data").glob(pattern))
    clips = [_read_wave(file) for file in files]
    return [
        {"mel": extractor(clip, sampling_rate=RATE, return_tensors="np").input_features}
        for clip in clips
    ]


def prompts(gguf: Path, count: int, tokens: int) -> list[Feeds]:
    """Consecutive pieces of prose, input_ids and attention_mask [1, tokens].

    Args:
        gguf: The model file, which holds the tokenizer.
        count: Number of pieces.
        tokens: Length of each.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    ids = tokenizer("\n\n".join(pydoc_data.topics.topics.values()))["input_ids"]
    pieces = np.array(ids[: count * tokens], np.int64).reshape(count, 1, tokens)
    return [{"input_ids": piece, "attention_mask": np.ones_like(piece)} for piece in pieces]


def _read_wave(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), np.int16) / np.float32(32768)
