"""Which ONNX Runtime is installed, if exactly one is."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from qcompiler.ir.errors import RuntimeMissingError

__all__ = ["OLDEST_ORT", "check_onnxruntime", "distribution", "import_onnxruntime", "version_of"]

OLDEST_ORT = "1.23"
"""The oldest ONNX Runtime that any bundle runs in."""

_PACKAGES = (
    "onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-migraphx",
    "onnxruntime-openvino", "onnxruntime-qnn", "onnxruntime-rocm", "onnxruntime-training",
)  # fmt: skip
"""Distributions that all install a module called `onnxruntime`."""


def import_onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        RuntimeMissingError: It is not installed, or more than one is.
    """
    installed = _installed()
    if len(installed) > 1:
        raise RuntimeMissingError(
            f"{' and '.join(installed)} are installed together and overwrite each other's files: "
            f"pip uninstall {' '.join(installed)}, then pip install the one you want"
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
            f"pip install --force-reinstall {distribution()}"
        )
    return onnxruntime


def check_onnxruntime() -> None:
    """Fail unless an ONNX Runtime is installed that runs what is compiled.

    Raises:
        RuntimeMissingError: There is none, or it is too old.
    """
    found = import_onnxruntime().__version__
    if version_of(found) < version_of(OLDEST_ORT):
        raise RuntimeMissingError(
            f"ONNX Runtime {found} is too old, {OLDEST_ORT} or newer is needed: "
            f"pip install -U {distribution()}"
        )


def distribution() -> str:
    """The package that `onnxruntime` is of: what to upgrade, for another would break it."""
    return (_installed() or ["onnxruntime"])[0]


def _installed() -> list[str]:
    return [name for name in _PACKAGES if _is_installed(name)]


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def version_of(text: str) -> tuple[int, ...]:
    """Major and minor version, as numbers that compare."""
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
