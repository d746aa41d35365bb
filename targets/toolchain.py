"""The C compiler and linker that make a library of kernels.

`ziglang`, a Python package, is preferred: it links against glibc 2.17 wherever it runs.  A C
compiler of the machine works too, and the library then needs that machine's glibc or newer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qcompiler.ir.errors import ToolchainError
from qcompiler.targets.cache import KernelCache

__all__ = ["Linker", "find_linker"]

_PATIENCE = 600
"""Seconds that one file may take to compile, or a library to link."""

_COMPILE_FLAGS = (
    "-std=c11", "-D_POSIX_C_SOURCE=200809L", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall",
    "-Wextra", "-Werror",
)  # fmt: skip
# No build id, no symbol table: the same inputs must give the same bytes.
_LINK_FLAGS = (
    "-shared", "-fPIC", "-s", "-Wl,--build-id=none", "-Wl,--gc-sections", "-Wl,-z,defs",
)  # fmt: skip
# Parts of the C library, before glibc 2.34; what is not used is not asked for.
_LIBRARIES = ("-Wl,--as-needed", "-lm", "-ldl", "-lc")
# Else zig compiles run-time libraries of its own before it links for the first time, of which our
# code needs nothing (`-z defs` would tell): 12 seconds, of half a minute for a small model.
_ZIG_LINK_FLAGS = ("-nostdlib",)


@dataclasses.dataclass(frozen=True)
class Linker:
    """A C compiler driver; `name` says which and of what version, so it can key caches."""

    name: str
    command: tuple[str, ...]
    link_flags: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        """Everything about it that may change what it makes."""
        # Not the path of the program: the name says which it is and of what version.
        flags = [*_COMPILE_FLAGS, *_LINK_FLAGS, *self.link_flags, *_LIBRARIES]
        return " ".join([self.name, *self.command[1:], *flags])

    def compile(
        self,
        source: str,
        headers: Mapping[str, str],
        flags: Sequence[str] = (),
        files: Mapping[str, bytes] | None = None,
    ) -> bytes:
        """The object made from C text; it includes `headers`, and its assembly `files`, by name."""
        with _workplace() as folder:
            for name, text in {**headers, "source.c": source}.items():
                Path(folder, name).write_text(text)
            for name, content in (files or {}).items():
                Path(folder, name).write_bytes(content)
            self._run([*_COMPILE_FLAGS, *flags, "-c", "source.c", "-o", "source.o"], folder)
            return Path(folder, "source.o").read_bytes()

    def link(
        self, objects: Sequence[bytes], exports: Sequence[str], flags: Sequence[str] = ()
    ) -> bytes:
        """A shared library of which only the symbols `exports` can be seen."""
        with _workplace() as folder:
            names = [f"{i}.o" for i in range(len(objects))]
            for name, content in zip(names, objects, strict=True):
                Path(folder, name).write_bytes(content)
            visible = "".join(f"{symbol}; " for symbol in exports)
            Path(folder, "exports.map").write_text(f"{{ global: {visible}local: *; }};\n")
            script = "-Wl,--version-script=exports.map"
            files = [script, *names, *_LIBRARIES, "-o", "library.so"]
            self._run([*_LINK_FLAGS, *self.link_flags, *flags, *files], folder)
            return Path(folder, "library.so").read_bytes()

    def _run(self, arguments: Sequence[str], folder: str) -> None:
        # Relative names in a fresh folder, so that no path of this machine reaches the output.
        command = [*self.command, *arguments]
        try:
            done = subprocess.run(
                command, cwd=folder, env=self._environment(), capture_output=True, text=True,
                check=False, timeout=_PATIENCE,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ToolchainError(
                f"cannot run {shlex.join(self.command)}: {error}; {self._way_out()}"
            ) from error
        if done.returncode != 0:
            message = f"{shlex.join(command)} failed:\n{done.stderr.strip()}\n"
            raise ToolchainError(message + self._way_out())

    def _environment(self) -> dict[str, str]:
        """Zig keeps what it made before in a folder of the user's; ours can be written."""
        return {"ZIG_GLOBAL_CACHE_DIR": str(KernelCache().folder / "zig"), **os.environ}

    def _way_out(self) -> str:
        if "ziglang" in self.command:
            return "to link with $CC instead: pip uninstall ziglang"
        return "set CC to another C compiler, or: pip install 'qcompiler[zig]'"


@contextlib.contextmanager
def _workplace() -> Iterator[str]:
    """A folder for the compiler's files, empty at first.

    Raises:
        ToolchainError: The disk refuses.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield folder
    except OSError as error:
        raise ToolchainError(
            f"cannot write temporary files to {tempfile.gettempdir()}: {error.strerror}; set "
            "TMPDIR to a folder with space"
        ) from error


def find_linker() -> Linker:
    """The package ziglang if it is installed, else `$CC`, cc, gcc or clang.

    Raises:
        ToolchainError: if there is none, or `$CC` does not exist.
    """
    if importlib.util.find_spec("ziglang") is not None:
        version = importlib.metadata.version("ziglang")
        return Linker(
            f"ziglang {version}",
            (sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-linux-gnu.2.17"),
            _ZIG_LINK_FLAGS,
        )
    try:
        explicit = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise ToolchainError(f"CC={os.environ['CC']} is no command: {error}") from error
    if explicit:
        return _system_compiler(explicit)
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return _system_compiler([name])
    raise ToolchainError("no C compiler found (cc, gcc, clang, $CC): pip install qcompiler[zig]")


def _system_compiler(command: Sequence[str]) -> Linker:
    path = shutil.which(command[0])
    if path is None:
        raise ToolchainError(
            f"CC={shlex.join(command)} does not exist; unset it or: pip install qcompiler[zig]"
        )
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    first_line = (done.stdout.splitlines() or [path])[0]
    return Linker(first_line, (path, *command[1:]))
