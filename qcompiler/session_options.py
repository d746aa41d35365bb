"""Options of ONNX Runtime sessions in which integer convolutions mean what ONNX says.

On x86 processors without VNNI, ONNX Runtime multiplies uint8 by int8 with an instruction that adds
two products in 16 bits and saturates (vpmaddubsw): sums are wrong by up to half, quantized models
lose 3 dB and more.  Bundles hold such weights for convolutions alone, because ORT has faster
kernels for those (`passes/fold_conv.py`), and one option makes it store them as uint8 and be exact.
It does nothing where VNNI is.

Models of others are opened without it: it fails on weights that two nodes share, and on some
DequantizeLinear of int8 weights (ORT 1.32).  Where their answers are a reference, `shift-weights`
makes them exact.
"""

from __future__ import annotations

from typing import Any

from qcompiler.installed import import_onnxruntime

__all__ = ["QUIET", "exact_sums", "new_session_options"]

QUIET = 4
"""The log level of sessions whose failures are raised, and whose warnings help nobody."""

_EXACT = "session.x64quantprecision"


def new_session_options(*, quiet: bool = False) -> Any:
    """Fresh `SessionOptions` with exact sums; `quiet` ones log nothing below a fatal error."""
    options = import_onnxruntime().SessionOptions()
    if quiet:
        options.log_severity_level = QUIET
    return exact_sums(options)


def exact_sums(options: Any) -> Any:
    """Ask for exact integer sums in these `SessionOptions`, unless they say something about it."""
    try:
        options.get_session_config_entry(_EXACT)
    except RuntimeError:
        options.add_session_config_entry(_EXACT, "1")
    return options
