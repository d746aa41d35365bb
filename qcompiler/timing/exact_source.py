"""What a bundle is timed against where ONNX Runtime's sums of its source are wrong.

Without VNNI its products of uint8 and int8 saturate: they are faster than any that are right.  No
bundle can win against them, nor should it answer as they do.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import constant, every_node
from qcompiler.passes.shift_weights import ShiftWeights
from qcompiler.session_options import sums_saturate

__all__ = ["exact_source"]

_EXACT = 64
"""2 x 255 x 64 is below 2**15."""


def _is_wide(model: ir.Model) -> bool:
    """Whether it has int8 weights of which two products by 255 do not fit into 16 bits.

    Some tools keep weights to 7 bits, for the sake of such processors.
    """
    operands = (value for node in every_node(model.graph) for value in node.inputs if value)
    weights = {value for value in operands if value.dtype is ir.DataType.INT8}
    arrays = (array for value in weights if (array := constant(value)) is not None)
    return any(np.abs(array.astype(np.int16)).max(initial=0) > _EXACT for array in arrays)


@contextlib.contextmanager
def exact_source(model: Path) -> Iterator[Path | None]:
    """A copy of `model` with exact sums, as fast as ONNX Runtime has them.

    Yields:
        The file, until the block ends; None if the sums of the model itself are exact here.
    """
    content = ir.load(model) if sums_saturate() else None
    if content is None or not _is_wide(content) or not ShiftWeights()(content).modified:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / model.name
        ir.save(content, copy, external_data=f"{copy.name}.data")
        yield copy
