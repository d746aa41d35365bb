"""Rows of tensors of a large model, which is run part by part on samples that somebody gave.

As `calibrate.sample_tokens`, with the weights between two of the tensors in memory, not all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.calibrate import TOKENS, is_large, sample_tokens, some_rows
from qcompiler.samples import Samples
from qcompiler.walk import walker

__all__ = ["sample_large"]


def sample_large(
    model: ir.Model, names: Sequence[str], samples: Samples
) -> Mapping[str, NDArray[np.float32]]:
    """What `sample_tokens` returns; a large model is run part by part.

    Args:
        model: It is not changed.
        names: Tensors to take rows of; where one of them is read by no node, all is run at once.
        samples: What to run it on.

    Raises:
        CalibrationError: A bad sample, or a tensor that is NaN or Inf on one; names both.
    """
    stops = _stops(model, names) if is_large(model) else []
    if not stops:
        return sample_tokens(model, names, samples)
    share, rows = max(1, TOKENS // len(samples)), dict[str, NDArray[np.float32]]()
    with walker(samples)(model, stops) as walk:
        for value in stops:
            name = value.name or ""
            rows |= some_rows(((text, {name: part}) for text, part in walk.rows(value)), share)
    return rows


def _stops(model: ir.Model, names: Sequence[str]) -> list[ir.Value]:
    """The named tensors in the order of their first readers; none where parts cannot be run."""
    order = {node: index for index, node in enumerate(model.graph)}
    values = [*model.graph.inputs, *(value for node in order for value in node.outputs)]
    first: dict[ir.Value, int] = {}
    for value in values:
        readers = [order[use.node] for use in value.uses() if use.node in order]
        if value.name in names and readers:
            first[value] = min(readers)
    has_all = len(first) == len(set(names))
    return sorted(first, key=first.__getitem__) if has_all else []
