"""The terminal: results on stdout, everything about getting there on stderr."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from qcompiler.cli import missing_package
from qcompiler.cli.streams import discard
from qcompiler.ir.errors import QCompilerError

if TYPE_CHECKING:
    from qcompiler.cli.progress import ProgressCallback

__all__ = ["EXIT_INTERRUPTED", "Terminal"]

_WIDTH_OF_A_FILE = 100
"""Columns where stdout is no terminal and $COLUMNS says nothing."""

EXIT_USER, EXIT_INTERNAL, EXIT_INTERRUPTED = 1, 70, 130
"""70 is EX_SOFTWARE of sysexits.h; 130 is 128 + SIGINT."""


class Terminal:
    """What a command prints to.

    Attributes:
        out: Results.
        err: Progress, warnings and errors.
        verbose: Tracebacks and further tables are wanted.
        interrupted: Ctrl-C was pressed, whether or not anyone took notice.
    """

    def __init__(self) -> None:
        self.out, self.err = _Results(False), _Remarks(True)
        self.verbose = False
        self.interrupted = False

    def json(self, value: object) -> None:
        """One JSON object, and nothing else, on stdout."""
        ascii_only = not self.out.encoding.startswith("utf")
        text = json.dumps(value, indent=2, ensure_ascii=ascii_only, allow_nan=False)
        self.out.print(text, soft_wrap=True)

    def error(self, message: str) -> None:
        """A line on stderr."""
        self.err.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)

    def warning(self, message: str) -> None:
        """A line on stderr."""
        self.err.print(Text.assemble(("warning: ", "bold yellow"), message), soft_wrap=True)

    def next(self, *commands: str) -> None:
        """What the user may want to run now."""
        for index, command in enumerate(commands):
            label = "Next  " if index == 0 else "      "
            self.out.print(Text.assemble((label, "dim"), (command, "cyan")), soft_wrap=True)

    def failure(self, error: Exception) -> int:
        """Explain why a command ended, and give its exit code."""
        if self.verbose:
            lines = "".join(traceback.format_exception(error)).rstrip()
            self.err.print(Text(lines, style="dim"), soft_wrap=True)
        if isinstance(error, QCompilerError):
            self.error(str(error))
        elif isinstance(error, OSError) and error.strerror:
            # A full disk, no permission: the machine's matter, not a bug of ours.
            where = f"{error.filename}: " if error.filename else ""
            if not where and error.errno == errno.ENOSPC:
                # Click's help, and files of other libraries, do not say where they go.
                where = (f"standard output, or temporary files in {tempfile.gettempdir()} "
                         "or where TMPDIR says: ")  # fmt: skip
            self.error(f"{where}{error.strerror}")
        elif isinstance(error, MemoryError):
            self.error(f"out of memory ({error})" if str(error) else "out of memory")
        elif isinstance(error, ModuleNotFoundError) and (hint := missing_package(error)):
            self.error(hint)
        else:
            label = Text("internal error: ", "bold red")
            self.err.print(label + Text(f"{type(error).__name__}: {error}"), soft_wrap=True)
            hint = "please report it" if self.verbose else (
                "run again with -v for the traceback; please report it")  # fmt: skip
            self.err.print(hint, style="dim")
            return EXIT_INTERNAL
        return EXIT_USER

    @contextlib.contextmanager
    def one_line_warnings(self) -> Iterator[None]:
        """Show Python's warnings as our own, without the source line they come from."""

        def show(message: Warning | str, *_: Any, **__: Any) -> None:
            self.warning(" ".join(str(message).split()))

        with warnings.catch_warnings():
            warnings.showwarning = show
            yield

    @contextlib.contextmanager
    def progress(self, shown: bool = True) -> Iterator[ProgressCallback]:
        """A bar where stderr is a terminal, else a line per stage; nothing unless `shown`."""
        if not shown:
            yield self._until_interrupted(lambda label, done, total: None)
            return
        from qcompiler.cli.progress import progress_bar, progress_lines

        if self.err.is_terminal:
            with progress_bar(self.err) as update:
                yield self._until_interrupted(update)
        else:
            yield self._until_interrupted(progress_lines(self.err))

    def note_interrupt(self) -> None:
        """Remember a Ctrl-C."""
        self.interrupted = True

    def flush(self) -> None:
        """Write what is still on its way to stdout, such as click's help.

        Raises:
            OSError: That failed; it names stdout.
        """
        with _named(self.out.file, "standard output"):
            self.out.file.flush()

    def _until_interrupted(self, update: ProgressCallback) -> ProgressCallback:
        def checked(label: str, done: float, total: int) -> None:
            if self.interrupted:  # and native code swallowed it
                raise KeyboardInterrupt
            update(label, done, total)

        return checked


class _Console(Console):
    """A stream that text reaches as it is, without markup or colours of its own."""

    def __init__(self, stderr: bool) -> None:
        stream = sys.stderr if stderr else sys.stdout
        width = None if stream.isatty() or "COLUMNS" in os.environ else _WIDTH_OF_A_FILE
        super().__init__(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


class _Results(_Console):
    """What goes to stdout; an error says so."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print, or raise an OSError that names where it could not."""
        with _named(self.file, "standard output"):
            super().print(*objects, **options)


class _Remarks(_Console):
    """What goes to stderr; there is nobody to tell where that fails."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print if possible."""
        try:
            super().print(*objects, **options)
        except OSError:
            discard(self.file)


@contextlib.contextmanager
def _named(stream: IO[str], name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        discard(stream)
        raise OSError(error.errno, error.strerror, name) from error
