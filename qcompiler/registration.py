"""A bundle's library in the options of a session: whether it is put there, and what comes of it."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qcompiler.bundle import LibraryEntry, Manifest
from qcompiler.installed import distribution, import_onnxruntime

__all__ = [
    "CUDA",
    "Provider",
    "is_for_gpus",
    "is_registered",
    "name_gpu",
    "register",
    "runs_twins",
    "tell_missing_gpu",
]

CUDA = "CUDAExecutionProvider"

Provider = str | tuple[str, dict[str, Any]]
"""An execution provider, alone or with its options, as ONNX Runtime takes them."""

_DEVICE = "qcompiler.device_id"
"""The config entry that tells a library which GPU judges what is registered."""
_CUDA_PACKAGE = "'onnxruntime-gpu[cuda,cudnn]'"


def is_for_gpus(manifest: Manifest) -> bool:
    """Whether the kernels of a bundle run in the CUDA provider."""
    return manifest.target.startswith("cuda")


def is_registered(options: Any, library: LibraryEntry) -> bool:
    """Whether the options hold this library; it leaves its domain there as a config entry."""
    try:
        return bool(options.get_session_config_entry(library.domain) == "registered")
    except RuntimeError:
        return False


def name_gpu(options: Any, providers: Sequence[Provider] | None) -> None:
    """Tell a library that is to be registered which GPU a session will run on.

    GPUs of one machine may differ. A name that is registered has no body any more, so what this GPU
    cannot run is not registered, though another could.

    Args:
        options: What the session is made with.
        providers: As for `load`; by default the first GPU.
    """
    given = [one[1] for one in providers or () if not isinstance(one, str) and one[0] == CUDA]
    number = str(given[0].get("device_id", 0) if given else 0)
    if number.isdecimal():  # of anything else ONNX Runtime says what is wrong
        options.add_session_config_entry(_DEVICE, number)


def register(options: Any, folder: Path, manifest: Manifest, library: LibraryEntry) -> None:
    """Add the library to the options, or warn that the bodies will run instead."""
    here = f"{platform.system().lower()}-{platform.machine().lower()}"
    path = folder / library.file
    if library.machine != here:
        problem = f"its kernels are for {library.machine}, this is {here}"
    elif not path.is_file():
        problem = f"{library.file} is missing"
    elif is_for_gpus(manifest) and CUDA not in import_onnxruntime().get_available_providers():
        problem = (
            f"this onnxruntime has no {CUDA}: pip uninstall {distribution()}, then pip install "
            f"{_CUDA_PACKAGE}"
        )
    else:
        manifest.check_file(folder, library.file)
        try:
            options.register_custom_ops_library(str(path.resolve()))
            return
        except Exception as error:
            problem = f"{library.file} cannot be loaded ({error})"
    warnings.warn(f"{folder}: {problem}; running without kernels", stacklevel=3)


def runs_twins(session: Any, options: Any, manifest: Manifest) -> bool:
    """Whether a session of a bundle has kernels for a GPU in its options, but none to run on."""
    if manifest.library is None or not is_for_gpus(manifest) or CUDA in session.get_providers():
        return False
    return is_registered(options, manifest.library)


def tell_missing_gpu(folder: Path, *, has_twins: bool) -> None:
    """Warn that ONNX Runtime went on without the GPU that a bundle's session was to run on.

    Args:
        folder: The bundle.
        has_twins: Whether kernels are registered all the same, so that bodies cannot run.
    """
    instead = "running without kernels"
    if has_twins:
        instead = (
            "kernels run as slow twins on the CPU: to run function bodies, pass fresh "
            "session_options and native=False"
        )
    warnings.warn(
        f"{folder}: ONNX Runtime could not make its {CUDA} (it says why on stderr; if libraries of "
        f"CUDA are missing: pip install {_CUDA_PACKAGE}); {instead}",
        stacklevel=3,
    )
