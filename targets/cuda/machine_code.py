"""What a CUDA compiler made of kernels: registers, spills, instructions, blocks per multiprocessor.

For tests and `benchmarks/cuda_static.py`, which judge kernels where there is no GPU.  Registers
and spills are what ptxas says; instructions need cuobjdump, of the CUDA toolkit or the packages
nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from qcompiler.ir.errors import ToolchainError
from qcompiler.targets.cubin import CubinCompiler

__all__ = ["KernelCode", "blocks_per_multiprocessor", "compile_kernels", "find_cuobjdump"]

_PATIENCE = 600
_ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)
_FUNCTION = re.compile(r"^\s*Function : (\w+)$", re.MULTILINE)
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")

_SHARED = {"sm_80": 164 << 10, "sm_89": 100 << 10, "sm_90a": 228 << 10}
"""Bytes of shared memory of a multiprocessor; a block takes 1 KiB more than it asks for."""
_WARPS = {"sm_80": 64, "sm_89": 48, "sm_90a": 64}
_BLOCKS = {"sm_80": 32, "sm_89": 24, "sm_90a": 32}
_REGISTERS = 65536


@dataclasses.dataclass(frozen=True)
class KernelCode:
    """One kernel.

    Attributes:
        registers: Per thread.
        spilled_bytes: Stored to and loaded from local memory, because registers ran out.
        stack_bytes: Of local memory for anything else, such as an array with a variable index.
        instructions: How often each stands in the code, by its whole name, such as
            "HMMA.16816.F32"; empty without cuobjdump.
    """

    registers: int
    spilled_bytes: int
    stack_bytes: int
    instructions: Mapping[str, int]

    def count(self, *beginnings: str) -> int:
        """How many instructions have names that begin with any of these."""
        return sum(n for name, n in self.instructions.items() if name.startswith(beginnings))


def find_cuobjdump() -> str | None:
    """The path of cuobjdump, if it and nvdisasm are here."""
    folders = [Path(found).parent for found in (shutil.which("cuobjdump"),) if found]
    folders.append(Path("/usr/local/cuda/bin"))
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec else ():
        folders += sorted(Path(place).glob("cu*/bin"))
    for folder in folders:
        if all(os.access(folder / name, os.X_OK) for name in ("cuobjdump", "nvdisasm")):
            return str(folder / "cuobjdump")
    return None


def compile_kernels(
    source: str, arch: str, compiler: CubinCompiler, cuobjdump: str | None
) -> dict[str, KernelCode]:
    """The kernels of a CUDA text, by name.

    Raises:
        ToolchainError: The text does not compile, or cuobjdump fails.
    """
    cubin, said = compiler.explain(source, arch)
    listing = ""
    if cuobjdump:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "kernel.cubin").write_bytes(cubin)
            listing = _run([cuobjdump, "-sass", "kernel.cubin"], folder)
    instructions = _instructions(listing)
    return {
        name: KernelCode(int(registers), int(stores) + int(loads), int(stack),
                         instructions.get(name, {}))
        for name, stack, stores, loads, registers in _ENTRY.findall(said)
    }  # fmt: skip


def _run(command: list[str], folder: str) -> str:
    # cuobjdump finds nvdisasm on the PATH.
    path = f"{Path(command[0]).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=_PATIENCE,
        env={**os.environ, "PATH": path},
    )  # fmt: skip
    if done.returncode != 0:
        raise ToolchainError(f"{command[0]} failed:\n{done.stderr.strip()}")
    return done.stdout + done.stderr


def _instructions(listing: str) -> dict[str, dict[str, int]]:
    _, *parts = _FUNCTION.split(listing)
    return {
        name: dict(collections.Counter(_INSTRUCTION.findall(code)))
        for name, code in zip(parts[::2], parts[1::2], strict=True)
    }


def blocks_per_multiprocessor(arch: str, registers: int, threads: int, shared_bytes: int) -> int:
    """How many blocks of a kernel a multiprocessor holds at a time."""
    # Registers are given out per warp, 256 at a time.
    per_warp = -(-registers * 32 // 256) * 256
    warps = -(-threads // 32)
    limits = (
        _REGISTERS // (per_warp * warps),
        _SHARED[arch] // (shared_bytes + 1024),
        _WARPS[arch] // warps,
        _BLOCKS[arch],
    )
    return min(limits)
