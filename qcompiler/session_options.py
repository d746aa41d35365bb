"""Options of ONNX Runtime sessions in which integer convolutions mean what ONNX says.

On x86 processors without VNNI, ONNX Runtime multiplies uint8 by int8 with an instruction that adds
two products in 16 bits and saturates (vpmaddubsw): sums are wrong by up to half, quantized models
lose 3 dB and more.  Bundles hold such weights for convolutions alone, because ORT has faster
kernels for those (`passes/fold_conv.py`), and for LSTMs that others quantized; one option makes it
store them as uint8 and be exact.
Where VNNI is, sums are exact as they are, and products by uint8 weights take 2.4 times as long (ORT
1.32, Zen 4): there the option stays off.

Models of others are opened without it: it fails on weights that two nodes share, and on some
DequantizeLinear of int8 weights (ORT 1.32).  Where their answers are a reference, `shift-weights`
makes them exact.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from qcompiler.installed import import_onnxruntime

__all__ = ["QUIET", "exact_sums", "new_session_options", "sums_saturate"]

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
    """Ask for exact integer sums in these `SessionOptions`, unless they say something about it.

    Where sums are exact anyway nothing is asked.
    """
    try:
        options.get_session_config_entry(_EXACT)
    except RuntimeError:
        if sums_saturate():
            options.add_session_config_entry(_EXACT, "1")
    return options


@functools.cache
def sums_saturate() -> bool:
    """Whether ONNX Runtime's sums of products by int8 saturate on this processor: it is tried."""
    options = import_onnxruntime().SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = QUIET, 1
    session = import_onnxruntime().InferenceSession(
        _saturating_model(), options, providers=["CPUExecutionProvider"]
    )
    (result,) = session.run(None, {"x": np.full((1, 4), 255, np.uint8)})
    return bool(result != 4 * 255 * 127)


def _saturating_model() -> bytes:
    """The file of y = MatMulInteger(x, w), x uint8 [1, 4] and w int8 [4, 1], each of it 127.

    In the wire format of protobuf (onnx.proto), because a bundle runs without onnx.
    """
    weight = _varints(1, 4, 1) + _varints(2, 3) + _bytes(8, b"w") + _bytes(9, b"\x7f" * 4)
    names = _bytes(1, b"x") + _bytes(1, b"w") + _bytes(2, b"y") + _bytes(4, b"MatMulInteger")
    graph = _bytes(1, names) + _bytes(2, b"g") + _bytes(5, weight)
    graph += _bytes(11, _tensor(b"x", 2, 1, 4)) + _bytes(12, _tensor(b"y", 6, 1, 1))
    return _varints(1, 8) + _bytes(7, graph) + _bytes(8, _varints(2, 13))


def _tensor(name: bytes, dtype: int, *sizes: int) -> bytes:
    """A ValueInfoProto."""
    shape = b"".join(_bytes(1, _varints(1, size)) for size in sizes)
    return _bytes(1, name) + _bytes(2, _bytes(1, _varints(1, dtype) + _bytes(2, shape)))


def _varints(field: int, *numbers: int) -> bytes:
    """Numbers below 128, each with its tag."""
    return b"".join(bytes((field << 3, number)) for number in numbers)


def _bytes(field: int, content: bytes) -> bytes:
    """Up to 127 bytes."""
    assert len(content) < 128
    return bytes((field << 3 | 2, len(content))) + content
