"""Windows of a text: what they hold, and a text that is too short."""

import numpy as np
import pytest

from qcompiler.ir.errors import CalibrationError, OptionError
from qcompiler.samples import Samples
from qcompiler.token_windows import TokenWindows


def test_windows_are_samples():
    samples = Samples(TokenWindows(range(100), 8, 3))
    found = [sample for _, sample in samples]
    assert len(samples) == 3 and samples.digest == Samples(TokenWindows(range(30), 8, 3)).digest
    assert [sample["input_ids"].tolist() for sample in found[:2]] == [
        [list(range(8))], [list(range(8, 16))],
    ]  # fmt: skip
    assert found[0]["input_ids"].dtype == found[0]["attention_mask"].dtype == np.int64
    assert found[0]["attention_mask"].tolist() == [[1] * 8]
    (sample,) = TokenWindows([1, 2], 2, 1, tokens="ids", mask=None)()
    assert list(sample) == ["ids"]


@pytest.mark.parametrize(
    ("tokens", "length", "count", "message"),
    [(100, 512, 32, "the text has 100 tokens, a window takes 512: give a longer text"),
     (1000, 512, 32, "the text has 1000 tokens, 32 windows take 16384: give a longer text")],
)  # fmt: skip
def test_a_text_that_is_too_short(tokens, length, count, message):
    with pytest.raises(CalibrationError, match=message):
        TokenWindows(range(tokens), length, count)


@pytest.mark.parametrize(("length", "count"), [(0, 1), (1, 0)])
def test_no_windows(length, count):
    with pytest.raises(OptionError, match="give 1 or more"):
        TokenWindows(range(9), length, count)
