"""Samples that nobody gave, of the sizes and the token ids that a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from qcompiler.random_inputs import random_feed
from qcompiler.samples import Sample
from qcompiler.vocabularies import vocabularies

__all__ = ["made_up"]

_ROWS = 64
"""Rows that are made up for an input that takes any number of them."""


def made_up(model: ir.Model, inputs: Sequence[Any]) -> Sample:
    """A sample that nobody gave: `random_feed`, with token ids of the whole vocabulary.

    Args:
        model: What it is for.
        inputs: As a session describes them.

    Raises:
        OptionError: An input whose values or sizes cannot be made up.
    """
    return random_feed(inputs, _many_rows(inputs), vocabularies(model))[0]


def _many_rows(inputs: Sequence[Any]) -> dict[str, tuple[int, ...]]:
    """Shapes for inputs that are rows of features, as many as one likes: of one nothing is learned.

    The largest of a channel over a single row is chance, and the rows of a batch need no more runs.
    """
    rows = (each for each in inputs if len(each.shape) == 2 and "float" in each.type)
    free = (each for each in rows if isinstance(each.shape[1], int))
    return {e.name: (_ROWS, e.shape[1]) for e in free if not isinstance(e.shape[0], int)}
