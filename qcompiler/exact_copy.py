"""Save a model so that ONNX Runtime's answers are what ONNX says: a reference for others.

On x86 processors without VNNI, ORT's sums saturate by int8 weights, in ops of integers and in those
that it fuses Q and DQ with.  The copy holds such weights as uint8 (`passes/shift_weights.py`); and
pairs are computed as floats, because ORT also fuses a Gemm whose bias has another scale than its
products, and rounds the float weights of a convolution between pairs.  Models without int8 weights
are saved, and run, as they are.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from qcompiler.model_file import saving
from qcompiler.passes.shift_weights import ShiftWeights

__all__ = ["make_exact", "save_exact"]

_FUSE_PAIRS = ("QDQSelectorActionTransformer", "QDQS8ToU8Transformer", "WeightBiasQuantization")


def save_exact(model: ir.Model, path: Path) -> tuple[str, ...]:
    """Save `model`, which is changed in place; its weights go beside it.

    Returns:
        The optimizers of ONNX Runtime that a session of it does without.

    Raises:
        OptionError: The disk refuses the file.
    """
    disabled = make_exact(model)
    with saving(path):
        ir.save(model, path, external_data=f"{path.name}.data")
    return disabled


def make_exact(model: ir.Model) -> tuple[str, ...]:
    """Change a model in place as above.

    Returns:
        The optimizers of ONNX Runtime that a session of it does without.
    """
    return _FUSE_PAIRS if ShiftWeights()(model).modified else ()
