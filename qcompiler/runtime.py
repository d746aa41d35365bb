"""Run a bundle: needs onnxruntime and numpy, neither TVM nor torch nor the rest of qcompiler.

The same in plain ONNX Runtime:

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library("model.x86-int8/libqcompiler-….so")
    session = onnxruntime.InferenceSession("model.x86-int8/model.onnx", options)
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompiler.bundle import MODEL, LibraryEntry, Manifest
from qcompiler.ir.errors import BundleError, ModelError, OptionError, RuntimeMissingError

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["import_onnxruntime", "load", "open_session"]

_PACKAGES = ("onnxruntime", "onnxruntime-gpu")


def load(
    bundle: str | os.PathLike[str],
    *,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    native: bool = True,
    session_options: onnxruntime.SessionOptions | None = None,
) -> onnxruntime.InferenceSession:
    """Open a bundle as a plain `onnxruntime.InferenceSession`.

    Args:
        bundle: The folder.
        providers: Execution providers in order; by default the bundle target's, then the CPU.
        threads: Threads inside one op; by default ORT's choice (one per core).
        native: Use the kernels; False runs the functions' bodies only.
        session_options: Further options; the library is added to them.

    Returns:
        The session.

    Raises:
        BundleError: Not a bundle, altered files, or an ONNX Runtime older than it needs.
        OptionError: `threads` below 1 or an unknown provider.
        RuntimeMissingError: No ONNX Runtime is installed.
    """
    folder = Path(bundle)
    manifest = Manifest.read(folder)
    ort = import_onnxruntime()
    if _version(ort.__version__) < _version(manifest.minimum_ort):
        raise BundleError(
            f"{folder} needs ONNX Runtime {manifest.minimum_ort} or newer, this is "
            f"{ort.__version__}; pip install -U onnxruntime"
        )
    for name in manifest.files:
        if manifest.library is None or name != manifest.library.file:
            manifest.check_file(folder, name)
    options = session_options or ort.SessionOptions()
    if native and manifest.library is not None:
        _register(options, folder, manifest, manifest.library)
    if providers is None:
        providers = _default_providers(manifest.target, ort.get_available_providers())
    return open_session(folder / MODEL, providers=providers, threads=threads, options=options)


def open_session(
    model: Path,
    *,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    options: onnxruntime.SessionOptions | None = None,
) -> onnxruntime.InferenceSession:
    """An `InferenceSession` of an ONNX file, with our errors instead of ORT's.

    Raises:
        ModelError: ORT cannot load the file.
        OptionError: `threads` below 1 or an unknown provider.
        RuntimeMissingError: No ONNX Runtime is installed.
    """
    ort = import_onnxruntime()
    options = options or ort.SessionOptions()
    if threads is not None:
        if threads < 1:
            raise OptionError(f"threads must be at least 1, not {threads}")
        options.intra_op_num_threads = threads
    available = ort.get_available_providers()
    for provider in providers or ():
        if provider not in available:
            raise OptionError(f"provider {provider!r} is not in this ONNX Runtime: {available}")
    try:
        return ort.InferenceSession(model, options, providers=providers or ["CPUExecutionProvider"])
    except Exception as error:
        # ORT raises a dozen unrelated exception types here, some of them bare RuntimeError.
        raise ModelError(f"ONNX Runtime cannot load {model}: {error}") from error


def import_onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        RuntimeMissingError: It is not installed.
    """
    installed = [name for name in _PACKAGES if _is_installed(name)]
    if len(installed) > 1:
        warnings.warn(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; "
            "pip uninstall both, then install one",
            stacklevel=3,
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeMissingError(
            "ONNX Runtime is not installed: pip install 'qcompiler[cpu]' (or [cuda])"
        ) from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise RuntimeMissingError(
            "the installed onnxruntime is broken (its files were removed with another package); "
            "pip install --force-reinstall onnxruntime"
        )
    return onnxruntime


def _register(options: Any, folder: Path, manifest: Manifest, library: LibraryEntry) -> None:
    """Add the library to the options, or warn that the bodies will run instead."""
    here = f"{platform.system().lower()}-{platform.machine().lower()}"
    path = folder / library.file
    if library.machine != here:
        problem = f"its kernels are for {library.machine}, this is {here}"
    elif not path.is_file():
        problem = f"{library.file} is missing"
    else:
        manifest.check_file(folder, library.file)
        try:
            options.register_custom_ops_library(str(path.resolve()))
            return
        except Exception as error:
            problem = f"{library.file} cannot be loaded ({error})"
    warnings.warn(f"{folder}: {problem}; running without kernels", stacklevel=4)


def _default_providers(target: str, available: Sequence[str]) -> list[str]:
    wanted = ["CUDAExecutionProvider"] if target.startswith("cuda") else []
    return [*(p for p in wanted if p in available), "CPUExecutionProvider"]


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
