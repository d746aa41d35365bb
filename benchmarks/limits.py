"""What the processor can do at most, measured: int8 and float32 products, and reading memory.

The loops are gemm.c's; `gemm.py` links its kernels with them.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.cli.host import instruction_sets
from qcompiler.targets.toolchain import find_linker
from qcompiler.targets.x86 import ISAS, Isa

STREAM_BYTES = 256 << 20

CHAINS = 12
"""Independent accumulators of gemm.c's peak loops."""

INT8_OPERATIONS = {"avx512-vnni": 128, "avx-vnni": 64, "avx2": 64}
"""Multiplications and additions of one step of such a chain."""

FLOAT_OPERATIONS = {"zmm": 32, "ymm": 16}
"""The same of float32, by register."""

Samples = list[float]


def aligned(array: np.ndarray, to: int = 64) -> np.ndarray:
    """A copy on a 64-byte boundary, as ONNX Runtime and our packing allocate, or on another."""
    raw = np.empty(array.nbytes + to, np.uint8)
    start = -raw.ctypes.data % to
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    """The address of an array's data."""
    return ctypes.c_void_p(array.ctypes.data)


def best_isa() -> Isa:
    """The best instruction set of this processor that kernels are compiled for."""
    return next(isa for isa in ISAS if isa.name in instruction_sets())


class Machine:
    """gemm.c, linked with what a benchmark adds to it."""

    def __init__(
        self,
        folder: Path,
        isa: Isa | None = None,
        objects: Sequence[bytes] = (),
        names: Sequence[str] = (),
    ) -> None:
        self.isa, linker = isa or best_isa(), find_linker()
        self._registers = "ymm" if self.isa.vectors < ISAS[0].vectors else "zmm"
        self._int8_peak = f"measure_peak_{self.isa.name.replace('-', '_')}"
        self._float_peak = f"measure_float_peak_{self._registers}"
        source = Path(__file__).with_name("gemm.c").read_text()
        exports = [self._int8_peak, self._float_peak, "measure_stream", "measure_loop", *names]
        path = folder / "gemm.so"
        path.write_bytes(linker.link([linker.compile(source, {}), *objects], exports))
        self._library = ctypes.CDLL(str(path))
        self._memory = aligned(np.ones(STREAM_BYTES, np.int8))

    def peak(self, threads: int) -> Samples:
        """Seconds per operation (a multiplication or an addition)."""
        return self._peak(self._int8_peak, INT8_OPERATIONS[self.isa.name], threads)

    def float_peak(self, threads: int) -> Samples:
        """Seconds per float32 operation."""
        return self._peak(self._float_peak, FLOAT_OPERATIONS[self._registers], threads)

    def stream(self, threads: int) -> Samples:
        """Seconds per byte."""
        size = ctypes.c_int64(STREAM_BYTES)
        samples = self._measure("measure_stream", pointer(self._memory), size, threads, repeats=4)
        return [sample / STREAM_BYTES for sample in samples]

    def _peak(self, name: str, operations: int, threads: int) -> Samples:
        iterations = 100_000
        samples = self._measure(name, ctypes.c_int64(iterations), threads, repeats=8)
        return [sample / (iterations * CHAINS * operations * threads) for sample in samples]

    def _measure(self, name: str, *arguments: Any, repeats: int) -> Samples:
        seconds = (ctypes.c_double * repeats)()
        getattr(self._library, name)(*arguments, repeats, seconds)
        return list(seconds)


def limits(threads: int, rounds: int = 5) -> dict[str, float]:
    """The best of some rounds: int8 and float32 multiply-adds, and bytes, each per second."""
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(Path(folder))
        tasks = {"int8_macs": machine.peak, "float_macs": machine.float_peak}
        best = {
            name: 0.5 / min(min(task(threads)) for _ in range(rounds))
            for name, task in tasks.items()
        }
        stream = min(min(machine.stream(threads)) for _ in range(rounds))
    return {f"{name}_per_s": value for name, value in best.items()} | {"bytes_per_s": 1 / stream}
