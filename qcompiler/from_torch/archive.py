"""A saved `.pt2`, read without pickle and without code of its own.

torch.export.load unpickles what a `.pt2` marks as pickled (tensor subclasses, script and opaque
objects, weights in the layout before torch 2.8, example inputs that are more than tensors), loads
native code (AOTInductor), evaluates the expressions of dynamic shapes, and compiles the graph from
the names in it.  All of it is looked at first, through the same reader, and what is more than data
is refused.  That is no sandbox: it is torch that reads the rest.
"""

from __future__ import annotations

import importlib
import io
import json
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from qcompiler.from_torch.graph_text import check_text
from qcompiler.ir.errors import ModelError

__all__ = ["read_program"]

_REGISTRARS = {
    "quantized_decomposed": "torch.ao.quantization.fx._decomposed",
    "torchao": "torchao.quantization",
    "torchvision": "torchvision",
}
"""What to import for the ops of a namespace."""

_AGAIN = "save it again with torch.export.save(program, 'model.pt2')"


def read_program(path: Path) -> torch.export.ExportedProgram:
    """Read the one program of a `.pt2`.

    Raises:
        ModelError: Not a `.pt2` of this torch, corrupt, or one that needs pickle or runs code.
    """
    try:
        from torch.export.pt2_archive import PT2ArchiveReader
    except ImportError as error:
        raise ModelError(
            f"cannot read {path}: torch {torch.__version__} knows no .pt2 archive; "
            "pip install 'torch>=2.8'"
        ) from error
    try:
        archive = PT2ArchiveReader(str(path))
    except Exception as error:
        # The reader is C++: RuntimeErrors for anything that is wrong, assertions for the format.
        raise ModelError(f"{path} {_what_else(path)}") from error
    try:
        _check_zip(path)
        _check(archive, path)
        return torch.export.load(path)
    except ModelError:
        raise
    except Exception as error:
        first, *_ = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{path} is not readable by torch {torch.__version__} (corrupt, or of another "
            f"version?): {first}"
        ) from error


def _what_else(path: Path) -> str:
    """What a file is that is no `.pt2`, and what to do about it."""
    if not zipfile.is_zipfile(path):
        return (
            "is not a .pt2: corrupt or truncated, or a pickle, which is never read; "
            f"build the module, export it with torch.export.export and {_AGAIN}"
        )
    with zipfile.ZipFile(path) as archive:
        names = {PurePosixPath(name).name for name in archive.namelist()}
    if "serialized_exported_program.json" in names:
        return f"was saved by a torch older than 2.8; load it there, and {_AGAIN} in this one"
    if "constants.pkl" in names:
        return (
            "is TorchScript, which holds no program that can be exported; export the module it was "
            f"made of with torch.export.export and {_AGAIN}"
        )
    if "data.pkl" in names:
        return (
            "is a checkpoint (torch.save): a pickle, and weights without the computation; load "
            "them into their module (load_state_dict), export it with "
            f"torch.export.export(module.eval(), inputs) and {_AGAIN}"
        )
    return "is a zip file, but neither an ONNX model nor a .pt2"


def _check_zip(path: Path) -> None:
    """The checksums, which torch does not compare, and the older layout, which it falls back to."""
    with zipfile.ZipFile(path) as content:
        damaged = content.testzip()
        if damaged is not None:
            raise ModelError(f"{path} is corrupt: the checksum of {damaged} is wrong")
        if "version" in content.namelist():
            raise ModelError(f"{path} mixes two layouts of .pt2; {_AGAIN}")


def _check(archive: Any, path: Path) -> None:
    """Refuse what torch.export.load would run or unpickle."""
    names = archive.get_file_names()
    models = [name for name in names if name.startswith("models/")]
    if any(name.startswith("data/aotinductor/") for name in names):
        raise ModelError(f"{path} holds compiled code (AOTInductor), which is not run; {_AGAIN}")
    if models != ["models/model.json"]:
        raise ModelError(f"{path} holds {len(models)} programs, not one named 'model'; {_AGAIN}")
    if {"data/weights/model.pt", "data/constants/model.pt"} & set(names):
        raise ModelError(f"{path} stores its weights as a pickle, as an older torch did; {_AGAIN}")
    for kind, prefix in (("weights", "weight_"), ("constants", "tensor_")):
        config = json.loads(archive.read_string(f"data/{kind}/model_{kind}_config.json"))
        for name, payload in config["config"].items():
            if payload["use_pickle"] or not payload["path_name"].startswith(prefix):
                raise ModelError(
                    f"{path} stores {name!r} as a pickle, as torch does for tensor subclasses "
                    "(torchao's quantized weights) and objects, and pickles are not read; save "
                    "program.run_decompositions({}), whose weights are plain, or give the program "
                    "itself to qcompiler.compile"
                )
    _check_inputs(archive.read_bytes("data/sample_inputs/model.pt"), path)
    graph = json.loads(archive.read_string("models/model.json"))
    check_text(graph, path)
    _register_ops(graph, path)


def _check_inputs(pickled: bytes, path: Path) -> None:
    """Example inputs must be tensors; torch falls back to an open pickle for anything else."""
    if not pickled:
        return
    try:
        torch.load(io.BytesIO(pickled), weights_only=True)
    except Exception as error:
        raise ModelError(
            f"{path} stores example inputs that are more than tensors, as a pickle, which is not "
            "read; set program.example_inputs = None and save it again"
        ) from error


def _register_ops(graph: Any, path: Path) -> None:
    """Import what registers the ops of the graph, where it is known."""
    targets = {node["target"] for node in graph["graph_module"]["graph"]["nodes"]}
    for target in sorted(targets):
        root, _, rest = target.partition("torch.ops.")
        if root or not rest:
            continue
        namespace, op, *_ = rest.split(".")
        if namespace in _REGISTRARS:
            try:
                importlib.import_module(_REGISTRARS[namespace])
            except ImportError as error:
                raise ModelError(
                    f"{path} uses {target}; install {namespace}, which it comes from"
                ) from error
        if not hasattr(getattr(torch.ops, namespace), op):
            raise ModelError(
                f"{path} uses {target}, which no imported library registers; import the one that "
                "does, and give this path to qcompiler.compile"
            )
