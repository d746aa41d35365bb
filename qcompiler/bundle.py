"""The bundle: one folder that ONNX Runtime runs, and the manifest that says what is in it.

    model.onnx, model.onnx.data       canonical weights, mmapped by ORT
    libqcompiler-<hash8>-<os>-<arch>.so
    manifest.json

Reading a bundle needs the standard library alone, so that deploying stays light.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import glob
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qcompiler.ir.errors import BundleError, OptionError, QCompilerError

__all__ = [
    "MANIFEST",
    "MODEL",
    "SCHEMA",
    "LibraryEntry",
    "Manifest",
    "check_destination",
    "sha256_of",
    "staged_folder",
]

_ATTEMPTS = 100

MODEL = "model.onnx"
MANIFEST = "manifest.json"
SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class LibraryEntry:
    """The native library of a bundle.

    Attributes:
        file: File name inside the bundle.
        domain: The op domain it registers.
        machine: "<os>-<arch>" it is linked for.
        isa: Instruction sets it carries, best first.
        minimum_glibc: Oldest C library it loads with.
    """

    file: str
    domain: str
    machine: str
    isa: tuple[str, ...]
    minimum_glibc: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything about a bundle that its model does not say itself.

    Attributes:
        target: Target name.
        tools: Versions that shaped the result.
        minimum_ort: Oldest ONNX Runtime that runs it, e.g. "1.23".
        recipe: The effective recipe, usable again.
        decisions: Per node: {"node", "op", "action", "why"}.
        files: sha256 of each file.
        library: The native library, if any kernel was bound.
        choices: Which kernel was chosen where, usable again; None where passes were given.
    """

    target: str
    tools: dict[str, str]
    minimum_ort: str
    recipe: dict[str, Any]
    decisions: list[dict[str, str]]
    files: dict[str, str]
    library: LibraryEntry | None = None
    choices: dict[str, Any] | None = None

    def write(self, folder: Path) -> None:
        """Write `manifest.json`.

        Raises:
            OptionError: The disk refuses.
        """
        content = {"schema": SCHEMA, **dataclasses.asdict(self)}
        text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
        try:
            (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise OptionError(f"cannot write {folder / MANIFEST}: {error.strerror}") from error

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and validate the manifest of a bundle.

        Raises:
            BundleError: No bundle there, an unreadable manifest, or one of another schema.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise BundleError(
                f"{folder} is not a bundle: it has no {MANIFEST}; give a folder that qcompile wrote"
            )
        try:
            content = json.loads(_read(path))
            schema = content.pop("schema")
            if schema != SCHEMA:
                raise BundleError(f"{path} has schema {schema}, this qcompiler reads {SCHEMA}")
            entry = content.pop("library")
            if entry is not None:
                entry = LibraryEntry(**entry | {"isa": tuple(entry["isa"])})
            manifest = cls(**content, library=entry)
            manifest._check_types()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BundleError(f"{path} is not a readable manifest ({error})") from error
        return manifest

    def _check_types(self) -> None:
        """Refuse a manifest that only looks like one, before anything relies on it."""
        for name in ("tools", "recipe", "files"):
            if not isinstance(getattr(self, name), dict):
                raise TypeError(f"{name} is no object")
        texts = [self.target, self.minimum_ort]
        texts += [*self.files, *self.files.values(), *self.tools, *self.tools.values()]
        needed = [MODEL]
        if self.library is not None:
            texts += [self.library.file, self.library.domain, self.library.machine]
            texts += self.library.isa
            needed.append(self.library.file)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a name or a hash in it is not a text")
        if not all(part.isdecimal() and part.isascii() for part in self.minimum_ort.split(".")):
            raise ValueError(f"minimum_ort {self.minimum_ort!r} is no version")
        if missing := [name for name in needed if name not in self.files]:
            raise ValueError(f"it has no hash of {missing[0]}")
        if any(Path(name).name != name for name in self.files):
            raise ValueError("a file in it lies outside the bundle")

    def check_file(self, folder: Path, name: str) -> None:
        """Compare a file with the hash recorded for it.

        Raises:
            BundleError: It is missing or differs.
        """
        path = folder / name
        if not path.is_file():
            raise BundleError(f"{path} is missing: the bundle is incomplete, compile it again")
        if sha256_of(path) != self.files.get(name):
            raise BundleError(
                f"{path} differs from the hash in {MANIFEST}: it was altered or copied in part; "
                "compile the bundle again"
            )


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_destination(destination: Path) -> Path:
    """The same path, if a bundle may be written there.

    Raises:
        OptionError: It is a file, the current folder, or a folder with something else in it.
    """
    try:
        exists = destination.exists()
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise OptionError(f"output {destination}: {error.strerror}") from error
    if exists:
        if not destination.is_dir():
            raise OptionError(f"output {destination} is a file; name a folder with -o DIR")
        if Path.cwd().resolve().is_relative_to(destination.resolve()):
            raise OptionError(
                f"output {destination} is the current folder, which cannot be replaced; name "
                "another with -o DIR"
            )
        if foreign := _foreign_files(destination):
            raise OptionError(
                f"output {destination} holds other files ({', '.join(foreign[:3])}); name another "
                "folder with -o DIR"
            )
    return destination


def _foreign_files(folder: Path) -> list[str]:
    """What a bundle's manifest does not account for: replacing the folder would lose it."""
    names = sorted(path.name for path in folder.iterdir())
    try:
        manifest = Manifest.read(folder)
    except BundleError:
        return names
    return [name for name in names if name != MANIFEST and name not in manifest.files]


@contextlib.contextmanager
def staged_folder(destination: Path) -> Iterator[Path]:
    """A new folder beside `destination` that takes its place when the block ends without error.

    Sessions that mapped the old bundle keep its files: they are moved aside, then unlinked.

    Raises:
        OptionError: The destination cannot be written, or see `check_destination`.
    """
    destination = check_destination(destination).resolve()
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(destination)
        stage = _make_stage(destination)
    except OSError as error:
        raise OptionError(f"cannot write to {destination.parent}: {error.strerror}") from error
    try:
        stage.chmod(0o755)
        try:
            yield stage
        except QCompilerError as error:
            if str(stage) not in str(error):
                raise
            # What was written there is gone: tell of the place that was asked for.
            raise type(error)(str(error).replace(str(stage), str(destination))) from error
        try:
            _exchange(stage, destination)
        except OSError as error:
            raise OptionError(f"cannot replace {destination}: {error.strerror}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _make_stage(destination: Path) -> Path:
    """A new folder beside the destination; its name says whose it is."""
    prefix = f"{_stage_prefix(destination)}{os.getpid()}-"
    return Path(tempfile.mkdtemp(prefix=prefix, dir=destination.parent))


def _stage_prefix(destination: Path) -> str:
    # With the machine's name: a folder may be shared, and processes have numbers on each.
    return f".{destination.name}.{platform.node()}-"


def _remove_orphans(destination: Path) -> None:
    """Remove what compilations of this bundle left that were killed on the spot."""
    prefix = _stage_prefix(destination)
    for folder in destination.parent.glob(f"{glob.escape(prefix)}*-*"):
        pid = folder.name.removeprefix(prefix).partition("-")[0]
        if pid.isdecimal() and not _is_running(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass  # somebody else's
    return True


def _exchange(stage: Path, destination: Path) -> None:
    """Put `stage` in the place of `destination`, or leave everything as it was.

    rename() onto a folder that is not empty fails, so an old bundle is moved aside first.  Another
    process may do the same meanwhile; the last one wins.
    """
    for attempt in range(_ATTEMPTS):
        old = _make_stage(destination)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.rename(destination, old)
            os.rename(stage, destination)
            return
        except OSError as error:
            if any(old.iterdir()) and not destination.exists():
                os.rename(old, destination)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == _ATTEMPTS - 1:
                raise
        finally:
            shutil.rmtree(old, ignore_errors=True)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BundleError(
            f"cannot read {path}: {error.strerror}; make it readable, or compile the bundle again"
        ) from error
