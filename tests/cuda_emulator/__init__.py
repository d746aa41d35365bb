"""Runs the CUDA C that TVM generates on the CPU: see `emulator.h` for what it is strict about."""

from __future__ import annotations

from cuda_emulator.run import Emulated, EmulatorError, kernels_of, needs_compiler

__all__ = ["Emulated", "EmulatorError", "kernels_of", "needs_compiler"]
