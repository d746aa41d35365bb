"""The errors a user can cause, each with what to do about it.

Everything qcompiler raises for a user's mistake is a `QCompilerError`; the command line prints its
message alone.  Anything else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import os
import re
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
    "cannot_read",
    "did_you_mean",
    "first_cause",
    "said_by_ort",
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


def cannot_read(what: str, path: str | os.PathLike[str], error: OSError, wanted: str) -> str:
    """The message of a file that cannot be read.

    Args:
        what: The file is meant to be.
        path: Where it is looked for.
        error: What the system says.
        wanted: What may be given instead.
    """
    if isinstance(error, FileNotFoundError):
        return f"no {what}: {path} does not exist; give {wanted}"
    return f"cannot read the {what} {path}: {error.strerror}; make it readable, or give {wanted}"


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest of `choices`, or an empty string."""
    # Nearest in any case: X86-INT8 shares no letter with x86-int8.
    known = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(word.lower(), known, n=1)
    return f"; did you mean {known[close[0]]!r}?" if close else ""


def said_by_ort(error: BaseException) -> str:
    """Why ONNX Runtime failed, on one line, without places in its sources.

    Args:
        error: What a session raised when it was made or run.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    node = re.search(r"Name:\s?'([^']*)'", text)
    if asked := re.search(r"Failed to allocate memory for requested buffer of size (\d+)", text):
        where = f"node {node[1]!r}" if node else "it"
        return (
            f"out of memory: {where} asks for {int(asked[1]) / (1 << 20):,.0f} MiB more; give "
            "smaller inputs"
        )
    if re.search("bad alloc|bad_alloc|bad array new length", text):
        return f"out of memory{f', in node {node[1]!r}' if node else ''}; give smaller inputs"
    return re.sub(r"/\S+?\.(?:cc|h|hpp):\d+ .*?\) (?=[A-Z\[])", "", text)


def first_cause(error: BaseException) -> BaseException:
    """The error that others were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
