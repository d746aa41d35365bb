"""Rows of tensors of a large model, which is run part by part.

As `calibrate.sample_tokens`, with the weights between two of the tensors in memory, not all.  What
counts is their size as floats, which ONNX Runtime makes of most: those of 4 bits have eight times
the room of their file then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompiler.calibrate import TOKENS, is_large, sample_tokens, some_rows
from qcompiler.ir.errors import CalibrationError, ModelError, OptionError
from qcompiler.made_up import made_up
from qcompiler.samples import Samples
from qcompiler.timing.observed_shapes import model_inputs
from qcompiler.walk import walker

__all__ = ["sample_large"]

_LARGEST_MADE_UP = 1 << 30
"""Bytes of weights that are read and run for inputs that nobody gave."""


def sample_large(
    model: ir.Model, names: Sequence[str], samples: Samples | None = None
) -> Mapping[str, NDArray[np.float32]]:
    """What `sample_tokens` returns; a large model is run part by part.

    Args:
        model: It is not changed.
        names: Tensors to take rows of; where one of them is read by no node, all is run at once.
        samples: What to run it on; by default on inputs made up for it, but for models whose
            weights are above 1 GiB as they are stored: that would take minutes for each pass.

    Raises:
        CalibrationError: A bad sample, or a tensor that is NaN or Inf on one; names both.
    """
    stops = _stops(model, names) if is_large(model) else []
    if not stops:
        return sample_tokens(model, names, samples)
    if samples is not None:
        return _rows_at(stops, model, samples)
    if _stored(model) > _LARGEST_MADE_UP:
        return {}
    try:
        feed = made_up(model, model_inputs(model))
        return _rows_at(stops, model, Samples(lambda: [feed]))
    except (CalibrationError, ModelError, OptionError):
        return {}  # whatever is wrong with inputs that nobody gave is nobody's mistake


def _rows_at(
    stops: Sequence[ir.Value], model: ir.Model, samples: Samples
) -> dict[str, NDArray[np.float32]]:
    share, rows = max(1, TOKENS // len(samples)), dict[str, NDArray[np.float32]]()
    with walker(samples)(model, list(stops)) as walk:
        for value in stops:
            name = value.name or ""
            rows |= some_rows(((text, {name: part}) for text, part in walk.rows(value)), share)
    return rows


def _stored(model: ir.Model) -> int:
    """Bytes of its weights."""
    weights = [value.const_value for value in model.graph.initializers.values()]
    return sum(tensor.nbytes for tensor in weights if tensor is not None)


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
