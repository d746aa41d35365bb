"""Samples of a language model out of a long text: windows of its tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from qcompiler.ir.errors import CalibrationError, OptionError
from qcompiler.samples import Sample

__all__ = ["TokenWindows"]


@dataclasses.dataclass(frozen=True)
class TokenWindows:
    """Windows of a text side by side, each a sample: `calibration=TokenWindows(ids, 512, 32)`.

    Attributes:
        ids: The tokens of the whole text.
        length: Tokens in a window.
        count: Windows.
        tokens: The model's input of tokens, int64 [1, length].
        mask: Its input that says which tokens count, all of them; None if it has none.

    Raises:
        CalibrationError: The text is shorter than the windows.
        OptionError: A window without tokens, or no window.
    """

    ids: Sequence[int]
    length: int = 512
    count: int = 32
    tokens: str = "input_ids"
    mask: str | None = "attention_mask"

    def __post_init__(self) -> None:
        if self.length < 1 or self.count < 1:
            raise OptionError(f"{self.count} windows of {self.length} tokens: give 1 or more")
        whole = len(self.ids) // self.length
        if whole < self.count:
            shorter = f"a window takes {self.length}"
            if whole:
                shorter = f"{self.count} windows take {self.count * self.length}"
            raise CalibrationError(
                f"the text has {len(self.ids)} tokens, {shorter}: give a longer text, or fewer or "
                "shorter windows"
            )

    @property
    def __name__(self) -> str:
        return "windows of the text"

    def __call__(self) -> Iterator[Sample]:
        """The samples, always the same."""
        ids = np.asarray(self.ids[: self.length * self.count], np.int64)
        for window in ids.reshape(self.count, 1, self.length):
            more = {} if self.mask is None else {self.mask: np.ones_like(window)}
            yield {self.tokens: window, **more}
