"""The three streams of this process, made such that printing to them cannot surprise us."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import IO

from qcompiler.cli import leave_at_once

__all__ = ["discard", "noting_interrupts", "prepare_streams"]

_PLAIN = {"→": "->", "µ": "u", "…": "..."}
"""What is printed for our own signs where the encoding lacks them."""


def prepare_streams() -> None:
    """Open streams that the caller closed, and let none fail for want of a letter."""
    # In this order, so that each gets the number that C programs started by us expect of it.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    codecs.register_error("qcompile", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="qcompile")


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Like errors="replace", but with words for what we print ourselves."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_PLAIN.get(letter, "?") for letter in text), error.end


def discard(stream: IO[str]) -> None:
    """Send to nowhere what could not be written, or Python tries it again when it exits."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def noting_interrupts(note: Callable[[], None]) -> Iterator[None]:
    """Call `note` on Ctrl-C, before the KeyboardInterrupt that native code may swallow."""
    ours = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    if not ours or before not in (signal.default_int_handler, leave_at_once):
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        note()
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
