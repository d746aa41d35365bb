"""An application in C that runs models in any ONNX Runtime, without Python: `native/host.c`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from raw_kernels import Array
from registry import package

from qcompiler.targets import toolchain
from qcompiler.targets.toolchain import find_linker

NATIVE = Path(__file__).resolve().parent / "native"
OLDEST = "1.23.2"
"""The oldest ONNX Runtime that a library works in."""
VERSIONS = ["installed", OLDEST]


def compile_program(source: Path, output: Path, *flags: str) -> None:
    """A C file, which may include the headers of our libraries, as what `flags` say."""
    headers = Path(toolchain.__file__).resolve().parent / "native"
    command = [*find_linker().command, "-std=c11", "-O1", f"-I{headers}", str(source), *flags]
    subprocess.run([*command, "-o", str(output)], check=True, capture_output=True, text=True)


def runtime(version: str) -> Path:
    """ONNX Runtime as a shared library, out of its wheel; skips the test where there is none."""
    root = Path(ort.__file__).parent
    if version != "installed":
        root = package(f"onnxruntime=={version}") / "onnxruntime"
    found = list(root.glob("capi/libonnxruntime.so*"))
    if not found:
        pytest.skip("this onnxruntime wheel has no libonnxruntime.so")
    return found[0]


def run(version: str, library: Path, model: Path, x: Array, columns: int, folder: Path) -> Array:
    """What a model makes of the matrix `x`, with that many columns."""
    compile_program(NATIVE / "host.c", folder / "host", "-ldl")
    files, sizes = [folder / "host", runtime(version), library, model], [*x.shape, columns]
    done = subprocess.run(
        [str(part) for part in [*files, *sizes]], input=x.tobytes(), capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    return np.frombuffer(done.stdout, np.float32).reshape(-1, columns)
