"""A temporary folder that goes with its process: what a killed one left is removed by the next.

Each folder holds a file that is locked as long as its process lives, whichever way that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
from pathlib import Path
from typing import IO

__all__ = ["HeldFolder"]

_LOCK = ".held"


class HeldFolder:
    """A new folder where `TMPDIR` says.

    Attributes:
        path: Where it is.
    """

    def __init__(self, prefix: str) -> None:
        """Make it, and remove others of this prefix whose processes are gone.

        Raises:
            OSError: There is no place for temporary files.
        """
        for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            _remove_if_free(left)
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        # Under its name only when it is locked: until then others leave the folder alone.
        unnamed = self.path / f"{_LOCK}-new"
        self._lock: IO[str] = unnamed.open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unnamed.rename(self.path / _LOCK)

    def remove(self) -> None:
        """Remove it, with all that it holds."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _remove_if_free(folder: Path) -> None:
    # What is held, another user's, or has no lock yet stays.
    with contextlib.suppress(OSError), (folder / _LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
