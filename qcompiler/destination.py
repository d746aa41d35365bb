"""Where results go: checked before any work is done for them, and exchanged in when it is done."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from qcompiler.bundle import MANIFEST, Manifest
from qcompiler.ir.errors import BundleError, OptionError, QCompilerError
from qcompiler.model_file import beside, weight_files

__all__ = ["check_file", "check_folder", "check_writable", "real_path", "staged_folder"]

_ATTEMPTS = 100

_ANOTHER_FOLDER = "name another folder with -o DIR"


def real_path(path: str | os.PathLike[str]) -> Path:
    """Where a path leads: x/../y is y, though the system finds nothing by it where x is not."""
    path = Path(path)
    return Path(os.path.realpath(path)) if ".." in path.parts and not path.parent.exists() else path


def check_folder(destination: Path, source: object = None) -> Path:
    """The same path, if a bundle may be written there.

    Args:
        destination: The folder, which need not be there.
        source: The model; its path, if it is a file.

    Raises:
        OptionError: It cannot be written; it is a file, the current folder, or a folder with
            something else in it, such as the model.
    """
    check_writable(destination, f"output {destination}", _ANOTHER_FOLDER)
    if destination.exists():
        if not destination.is_dir():
            raise OptionError(f"output {destination} is a file; name a folder with -o DIR")
        if Path.cwd().resolve().is_relative_to(destination.resolve()):
            raise OptionError(
                f"output {destination} is the current folder, which cannot be replaced; "
                f"{_ANOTHER_FOLDER}"
            )
        if _holds(destination, source):
            raise OptionError(
                f"output {destination} holds the model {source} itself; {_ANOTHER_FOLDER}"
            )
        if foreign := _foreign_files(destination):
            raise OptionError(
                f"output {destination} holds other files ({', '.join(foreign[:3])}); "
                f"{_ANOTHER_FOLDER}"
            )
    return destination


def check_file(path: Path, source: Path | None) -> Path:
    """The same path, if a model may be written there.

    Raises:
        OptionError: It cannot be written; it is a folder, a device, or the file that the model came
            from; the file of weights beside it is another model's.
    """
    check_writable(path, f"output {path}", "name another file")
    if path.is_dir():
        raise OptionError(f"output {path} is a folder; name a file in it, such as {path}/out.onnx")
    if path.exists() and not path.is_file():
        # A device, such as /dev/full, would be replaced by a file.
        raise OptionError(f"output {path} is no regular file; name another file")
    if source is not None and path.exists() and path.samefile(source):
        raise OptionError(f"{path} is the input; name another file")
    for file in (path, beside(path)):
        if source is not None and file.is_file() and _has_weights_of(file, source):
            raise OptionError(f"{file} holds weights of {source}; name another output than {path}")
    if beside(path).exists() and not path.exists():
        raise OptionError(
            f"{beside(path)} is there, and weights of {path} would replace it; name another file"
        )
    return path


def _has_weights_of(file: Path, source: Path) -> bool:
    try:
        files = weight_files(ir.load(source))
    except Exception:
        return False  # what is wrong with the model is said where it is read
    return any(other.exists() and other.samefile(file) for other in files)


def check_writable(path: Path, what: str, remedy: str) -> None:
    """Find out whether a file or folder can be made, by making one beside it.

    Permissions do not tell: a disk may be read-only or full, and root may do what it likes.

    Args:
        path: What will be made, with the folders it lies in.
        what: What messages call it.
        remedy: What to do if it cannot.

    Raises:
        OptionError: It cannot.
    """
    folder = Path(os.path.realpath(path)).parent
    try:
        while not folder.exists():
            folder = folder.parent
        _make_stage(folder / path.name).rmdir()
    except OSError as error:
        reason = str(error.strerror)
        if error.errno == errno.ENOENT:  # as of /proc, although the folder is there
            reason = "nothing can be made in it"
        raise OptionError(f"{what} cannot be written: {folder}: {reason}; {remedy}") from error


def _holds(destination: Path, source: object) -> bool:
    if not isinstance(source, str | os.PathLike):
        return False
    return Path(os.path.realpath(source)).is_relative_to(destination.resolve())


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
        OptionError: See `check_folder`.
    """
    destination = Path(os.path.realpath(check_folder(destination)))
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(destination)
        stage = _make_stage(destination)
    except OSError as error:
        raise OptionError(
            f"output {destination} cannot be written: {error.strerror}; {_ANOTHER_FOLDER}"
        ) from error
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
