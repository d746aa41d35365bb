"""The errors a user can cause, each with what to do about it.

Everything qcompiler raises for a user's mistake is a `QCompilerError`; the command line prints its
message alone.  Anything else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BundleError",
    "CalibrationError",
    "ModelError",
    "NumericsError",
    "OptionError",
    "QCompilerError",
    "RuntimeMissingError",
    "ToolchainError",
    "VerifyError",
    "did_you_mean",
]


class QCompilerError(Exception):
    """A mistake in what qcompiler was given; the message says where and what to do."""


class ModelError(QCompilerError):
    """The model is unreadable, incomplete, or holds values that cannot be quantized."""


class OptionError(QCompilerError, ValueError):
    """An option, target, pass or node name that does not exist, or a value out of range."""


class CalibrationError(QCompilerError):
    """A calibration sample is missing, has the wrong name, shape or dtype, or is not finite."""


class NumericsError(QCompilerError):
    """A pass changed what the model computes by more than it may."""


class BundleError(QCompilerError):
    """A bundle is incomplete, was altered, or needs another ONNX Runtime."""


class RuntimeMissingError(QCompilerError, ImportError):
    """No usable ONNX Runtime is installed."""


class ToolchainError(QCompilerError):
    """The kernels could not be compiled or linked on this machine."""


class VerifyError(Exception):
    """A pass left the model in a state its stage does not allow: a bug in that pass."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest of `choices`, or an empty string."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
