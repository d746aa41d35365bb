"""Run a bundle: needs onnxruntime and numpy, neither TVM nor torch nor the rest of qcompiler.

The same in plain ONNX Runtime:

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library("model.x86-int8/libqcompiler-….so")
    session = onnxruntime.InferenceSession("model.x86-int8/model.onnx", options)
"""

from __future__ import annotations

import os
import types
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompiler.arguments import require, require_path, require_utf8
from qcompiler.bundle import MANIFEST, MODEL, Manifest
from qcompiler.installed import distribution, import_onnxruntime, version_of
from qcompiler.ir.errors import BundleError, ModelError, OptionError, said_by_ort
from qcompiler.registration import (
    CUDA,
    Provider,
    is_for_gpus,
    is_registered,
    name_gpu,
    register,
    runs_twins,
    tell_missing_gpu,
)
from qcompiler.session_options import QUIET, exact_sums

if TYPE_CHECKING:
    import onnxruntime

__all__ = [
    "load",
    "open_altered",
    "open_model",
    "open_session",
]

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"

_MOST_THREADS = 1024
"""More than any machine has cores; ORT would start as many as it is told."""


def load(
    bundle: str | os.PathLike[str],
    *,
    providers: Sequence[Provider] | None = None,
    threads: int | None = None,
    native: bool = True,
    session_options: onnxruntime.SessionOptions | None = None,
) -> onnxruntime.InferenceSession:
    """Open a bundle as a plain `onnxruntime.InferenceSession`.

    Args:
        bundle: The folder.
        providers: Execution providers in order; by default the bundle target's, then the CPU.
        threads: Threads inside one op; by default ORT's choice (one per core).
        native: Use the kernels; False runs the functions' bodies only, as do kernels for GPUs where
            `providers` has none.
        session_options: Further options. The library, `threads` and exact sums (see
            `qcompiler/session_options.py`) are added to this very object.

    Returns:
        The session.

    Raises:
        BundleError: Not a bundle, altered files, or an ONNX Runtime older than it needs.
        OptionError: `threads` below 1 or an unknown provider.
        RuntimeMissingError: No ONNX Runtime is installed.
    """
    require("native", native, bool, "True or False")
    if bundle is None:
        raise OptionError("no bundle was given: name its folder")
    require_path("bundle", bundle)
    folder = Path(bundle)
    manifest = Manifest.read(folder)
    ort = import_onnxruntime()
    require("session_options", session_options, ort.SessionOptions, "SessionOptions")
    _check_bundle(folder, manifest, ort.__version__)
    options = exact_sums(session_options or ort.SessionOptions())
    names = [CUDA] if providers is None else _names_of(providers, ort)
    if manifest.library is not None:
        registered = is_registered(options, manifest.library)
        if registered and not native:
            raise OptionError(
                "native=False, but these session_options already hold the bundle's kernels; pass "
                "fresh ones"
            )
        # On the CPU the twins of kernels for GPUs would run, up to 500 times slower than bodies.
        if native and (CUDA in names or not is_for_gpus(manifest)):
            if is_for_gpus(manifest) and not registered:
                name_gpu(options, providers)
            register(options, folder, manifest, manifest.library)
    if providers is None:
        providers = _default_providers(manifest, ort.get_available_providers())
    session = open_session(folder / MODEL, providers=providers, threads=threads, options=options)
    if CUDA not in names or not runs_twins(session, options, manifest):
        return session
    tell_missing_gpu(folder, has_twins=session_options is not None)
    if session_options is not None:
        return session
    return open_session(folder / MODEL, threads=threads, options=exact_sums(ort.SessionOptions()))


def _check_bundle(folder: Path, manifest: Manifest, version: str) -> None:
    """Refuse an ONNX Runtime older than it needs, and altered files; its library is checked later.

    Raises:
        BundleError: Says which.
    """
    if version_of(version) < version_of(manifest.minimum_ort):
        raise BundleError(
            f"{folder} needs ONNX Runtime {manifest.minimum_ort} or newer, this is {version}; "
            f"pip install -U {distribution()}"
        )
    for name in manifest.files:
        if manifest.library is None or name != manifest.library.file:
            manifest.check_file(folder, name)


def open_session(
    model: Path,
    *,
    providers: Sequence[Provider] | None = None,
    threads: int | None = None,
    options: onnxruntime.SessionOptions | None = None,
    disabled: Sequence[str] = (),
) -> onnxruntime.InferenceSession:
    """An `InferenceSession` of an ONNX file, with our errors instead of ORT's.

    Args:
        model: The file.
        providers: Execution providers in order; by default the CPU.
        threads: Threads inside one op.
        options: Further options.
        disabled: Optimizers of ORT's to do without.

    Raises:
        ModelError: ORT cannot load the file.
        OptionError: `threads` below 1, an unknown provider, or a path that is no UTF-8.
        RuntimeMissingError: No ONNX Runtime is installed.
    """
    require_utf8("model", model)
    ort = import_onnxruntime()
    if options is None:
        options = ort.SessionOptions()
        options.log_severity_level = QUIET  # failures are raised
    if threads is not None:
        if type(threads) is not int or not 1 <= threads <= _MOST_THREADS:
            most = f"from 1 to {_MOST_THREADS}"
            raise OptionError(f"threads must be a whole number {most}, not {threads!r}")
        options.intra_op_num_threads = threads
    if CUDA in _names_of(providers, ort):
        _find_cuda(ort)
    try:
        return ort.InferenceSession(
            model, options, providers or ["CPUExecutionProvider"], disabled_optimizers=disabled
        )
    except Exception as error:
        # ORT raises a dozen unrelated exception types here, some of them bare RuntimeError.
        reason = said_by_ort(error).replace(f"Load model from {model} failed:", "")
        if "Protobuf parsing failed" in reason:
            reason = "it is no ONNX model, or damaged; export it again"
        raise ModelError(f"ONNX Runtime cannot load {model}: {reason}") from error


def open_model(
    path: Path,
    *,
    providers: Sequence[Provider] | None = None,
    threads: int | None = None,
    native: bool = True,
    options: onnxruntime.SessionOptions | None = None,
) -> onnxruntime.InferenceSession:
    """A session of a bundle or of an ONNX file, whichever `path` is.

    Raises:
        ModelError: There is nothing at `path`, or ORT cannot load it.
        BundleError: A folder that is not a complete bundle.
    """
    if not path.exists():
        raise ModelError(f"no model: {path} does not exist")
    if path.name == MANIFEST:
        path = path.parent
    if path.is_dir():
        return load(
            path, providers=providers, threads=threads, native=native, session_options=options
        )
    return open_session(path, providers=providers, threads=threads, options=options)


def open_altered(path: Path, model: bytes, *, native: bool = True) -> onnxruntime.InferenceSession:
    """A session of a changed copy of a bundle's model, or of a file's, on the CPU.

    Args:
        path: The bundle or the file: the weights of the copy stay there.
        model: The copy, serialized.
        native: Use the bundle's kernels.

    Raises:
        BundleError: Not a bundle, or an altered library.
        ModelError: ORT cannot load the copy.
    """
    ort = import_onnxruntime()
    options, folder = ort.SessionOptions(), path if path.is_dir() else path.parent
    options.log_severity_level = QUIET
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(folder.absolute()))
    if path.is_dir():
        exact_sums(options)
    if path.is_dir() and native:
        manifest = Manifest.read(path)
        if manifest.library is not None and not is_for_gpus(manifest):
            register(options, path, manifest, manifest.library)
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # ORT raises a dozen unrelated exception types here, some of them bare RuntimeError.
        raise ModelError(f"ONNX Runtime cannot look inside {path}: {said_by_ort(error)}") from error


def _name_of(provider: object) -> str:
    """The name of an execution provider, after checking its form."""
    match provider:
        case str(name) | (str(name), dict()):
            return name
    raise OptionError(f"provider {provider!r} is neither a name nor (name, {{option: value}})")


def _names_of(providers: Sequence[Provider] | None, ort: Any) -> list[str]:
    """The names of execution providers, all of which this ONNX Runtime must have."""
    available = ort.get_available_providers()
    if isinstance(providers, str):
        raise OptionError(f"providers is a sequence of names: give [{providers!r}]")
    require("providers", providers, Sequence, "a sequence of names")
    names = [_name_of(provider) for provider in providers or ()]
    for name in names:
        if name not in available:
            raise OptionError(f"provider {name!r} is not in this ONNX Runtime: {available}")
    return names


def _default_providers(manifest: Manifest, available: Sequence[str]) -> list[str]:
    wanted = [CUDA] if is_for_gpus(manifest) else []
    return [*(p for p in wanted if p in available), "CPUExecutionProvider"]


def _find_cuda(ort: Any) -> None:
    """Let ONNX Runtime find the CUDA libraries of wheels, which are not where the system looks."""
    preload = getattr(ort, "preload_dlls", None)
    if preload is None:
        return
    # It prints what it does not find; if that is needed, opening the session says so.  It gets a
    # print of its own: to redirect stdout would silence the other threads, too.
    silent = types.FunctionType(
        preload.__code__, {**preload.__globals__, "print": lambda *_, **__: None},
        preload.__name__, preload.__defaults__, preload.__closure__,
    )  # fmt: skip
    silent.__kwdefaults__ = preload.__kwdefaults__
    silent()
