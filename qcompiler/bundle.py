"""The bundle: one folder that ONNX Runtime runs, and the manifest that says what is in it.

    model.onnx, model.onnx.data       canonical weights, mmapped by ORT
    libqcompiler-<hash8>-<os>-<arch>.so
    manifest.json

Reading a bundle needs the standard library alone, so that deploying stays light.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from qcompiler.ir.errors import BundleError, OptionError

__all__ = [
    "MANIFEST",
    "MODEL",
    "SCHEMA",
    "LibraryEntry",
    "Manifest",
    "sha256_of",
]

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
            _check_schema(path, content)
            entry = content.pop("library")
            if entry is not None:
                entry = LibraryEntry(**entry | {"isa": tuple(entry["isa"])})
            manifest = cls(**content, library=entry)
            manifest._check_types()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise BundleError(
                f"{path} is not a readable manifest ({reason}); compile the bundle again"
            ) from error
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
        if not all(self.target.partition("-")):
            raise ValueError(f"target {self.target!r} is no ARCHITECTURE-SCHEME")
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


def _check_schema(path: Path, content: dict[str, Any]) -> None:
    """Take the schema out of a manifest's content.

    Raises:
        BundleError: It is of another schema.
        TypeError: It says of none.
    """
    if not isinstance(content, dict):
        raise TypeError("it is no object")
    if "schema" not in content:
        raise TypeError("it does not say of which schema it is")
    schema = content.pop("schema")
    if type(schema) is not int:
        raise TypeError(f"its schema is {schema!r}, which is no whole number")
    if schema != SCHEMA:
        newer = "pip install -U qcompiler" if schema > SCHEMA else "compile the bundle again"
        raise BundleError(f"{path} has schema {schema}, this qcompiler reads {SCHEMA}: {newer}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BundleError(
            f"cannot read {path}: {error.strerror}; make it readable, or compile the bundle again"
        ) from error
