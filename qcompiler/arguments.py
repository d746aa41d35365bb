"""Arguments of the Python API, checked where they come in."""

from __future__ import annotations

import os
from typing import Any

from qcompiler.ir.errors import OptionError

__all__ = ["require", "require_path", "require_utf8"]

_MOST_LETTERS = 80
"""Of a value in a message: an array would fill the screen."""


def require(name: str, value: object, kind: Any, what: str) -> None:
    """Refuse a value that is neither of a type nor None.

    Raises:
        OptionError: Names the argument, the value, and what it should be.
    """
    if value is not None and not isinstance(value, kind):
        raise OptionError(f"{name} must be {what}, not {_short(value)}")


def require_path(name: str, value: object) -> None:
    """Refuse what is no path, and an empty one, which would be the current folder.

    Raises:
        OptionError: Names the argument and the value.
    """
    require(name, value, str | os.PathLike, "a path")
    text = None if value is None else os.fsdecode(value)  # type: ignore[arg-type]
    if text == "":
        raise OptionError(f"{name} is empty; give a path, or '.' for the current folder")
    if text is not None and "\0" in text:
        raise OptionError(f"{name} {value!r} holds a NUL, which no path may")


def require_utf8(name: str, path: Any) -> None:
    """Refuse a path with bytes that are no UTF-8: ONNX Runtime opens none of those.

    Raises:
        OptionError: Names the argument and the path.
    """
    try:
        b"" if path is None else os.fsdecode(path).encode()
    except UnicodeEncodeError:
        raise OptionError(
            f"{name} {os.fsdecode(path)!r} has bytes that are no UTF-8, and ONNX Runtime opens no "
            "such path: rename it"
        ) from None


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]}…"
