"""Compiled kernels and libraries on disk, found again by the hash of everything they came from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from qcompiler.ir.errors import ToolchainError

__all__ = ["KernelCache", "content_key", "write_atomically"]

_DIGEST_BYTES = hashlib.sha256().digest_size


class KernelCache:
    """A folder of entries, each its own SHA-256 digest and then the content.

    Several processes may share one: entries appear complete or not at all, and one that was
    damaged is as good as absent.

    Args:
        folder: where entries live; by default `$QCOMPILER_CACHE`, else `$XDG_CACHE_HOME/qcompiler`,
            else `~/.cache/qcompiler`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder if folder is not None else _default_folder()

    def get(self, key: str) -> bytes | None:
        """The content stored under `key`, or None."""
        try:
            entry = self._path(key).read_bytes()
        except OSError:
            return None
        digest, content = entry[:_DIGEST_BYTES], entry[_DIGEST_BYTES:]
        return content if hashlib.sha256(content).digest() == digest else None

    def __contains__(self, key: str) -> bool:
        """Whether there is an entry, which may be damaged."""
        return self._path(key).is_file()

    def put(self, key: str, content: bytes) -> None:
        """Store `content` under `key`.

        Raises:
            ToolchainError: if the folder cannot be written.
        """
        try:
            write_atomically(self._path(key), hashlib.sha256(content).digest() + content)
        except OSError as error:
            raise ToolchainError(
                f"cannot write the kernel cache {self.folder}: {error.strerror}; "
                "set QCOMPILER_CACHE to a folder that can be written"
            ) from error

    def get_or_make(self, key: str, make: Callable[[], bytes]) -> bytes:
        """The content stored under `key`, made and stored now if it was not."""
        content = self.get(key)
        if content is None:
            content = make()
            self.put(key, content)
        return content

    def keep(self, key: str, value: object) -> None:
        """Store a value that JSON holds, if the folder can be written: nothing depends on it."""
        with contextlib.suppress(ToolchainError):
            self.put(key, json.dumps(value).encode())

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key


def content_key(*parts: str | bytes) -> str:
    """A hash of `parts` that also tells where one ends and the next begins."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a file so that others see all of it or nothing; parents are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _default_folder() -> Path:
    if explicit := os.environ.get("QCOMPILER_CACHE"):
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qcompiler"
