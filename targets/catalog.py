"""Every target name, and which of its kernels exist today."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from qcompiler.ir.errors import OptionError, did_you_mean
from qcompiler.ir.region import Region
from qcompiler.targets.backend import Backend, backend_of
from qcompiler.targets.target import Scheme, Target

__all__ = ["TARGETS", "built_isas", "fingerprint", "get_target", "unsupported"]

_INT8 = Scheme("int8", weight=ir.DataType.INT8, activation=ir.DataType.INT8)
# Rounded to nearest, groups of 32 lose least; 128 is what the CUDA kernels are laid out for.
_INT4_CPU = Scheme(
    "int4", weight=ir.DataType.INT4, activation=ir.DataType.INT8, group_sizes=(32, 64, 128)
)
_INT8_CUDA = dataclasses.replace(_INT8, images=True)
_NO_CONV = dataclasses.replace(
    _INT8_CUDA, conv_weight=None, no_conv="convolutions are rounded by cuda-int8 alone"
)
_INT4_CUDA = dataclasses.replace(
    _NO_CONV,
    name="int4",
    weight=ir.DataType.INT4,
    activation=None,
    group_sizes=(128, 64, 32),
)
_FP8 = dataclasses.replace(
    _NO_CONV,
    name="fp8",
    weight=ir.DataType.FLOAT8E4M3FN,
    activation=ir.DataType.FLOAT8E4M3FN,
)

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_X86 = ("avx512-vnni", "avx-vnni", "avx2")
_ARM = ("i8mm", "dotprod")
_SM = ("sm_90a", "sm_89", "sm_80")

TARGETS = {
    target.name: target
    for target in (
        Target("x86-int8", "x86", _INT8, _X86, _CPU, "linux-x86_64"),
        Target("x86-int4", "x86", _INT4_CPU, _X86, _CPU, "linux-x86_64"),
        Target("arm-int8", "arm", _INT8, _ARM, _CPU, "linux-aarch64"),
        Target("arm-int4", "arm", _INT4_CPU, _ARM, _CPU, "linux-aarch64"),
        Target("cuda-int8", "cuda", _INT8_CUDA, _SM, _CUDA, "linux-x86_64", "fp16"),
        Target("cuda-int4", "cuda", _INT4_CUDA, _SM, _CUDA, "linux-x86_64", "fp16"),
        Target("cuda-fp8", "cuda", _FP8, _SM[:2], _CUDA, "linux-x86_64", "fp16"),
    )
}


def get_target(name: str) -> Target:
    """The target called `name`.

    Raises:
        OptionError: There is none; the message lists them.
    """
    if not isinstance(name, str):
        raise OptionError(f"a target is a name, such as 'x86-int8', not {name!r}")
    try:
        return TARGETS[name]
    except KeyError:
        hint = did_you_mean(name, TARGETS) or f"; one of {', '.join(TARGETS)}"
        raise OptionError(f"unknown target {name!r}{hint}") from None


def built_isas(target: Target) -> tuple[str, ...]:
    """The instruction sets that kernels of the target exist for, best first."""
    backend = _backend(target)
    return () if backend is None else tuple(isa for isa in target.isa if isa in backend.all_isas)


def unsupported(target: Target, region: Region) -> str | None:
    """Why the target has no kernel for a region, or None if it has one."""
    backend = _backend(target)
    return f"no {target.name} kernels yet" if backend is None else backend.supports(region)


def fingerprint(target: Target) -> str:
    """Hash of everything that shapes the target's kernels; empty while it has none."""
    backend = _backend(target)
    return "" if backend is None else backend.fingerprint()


def _backend(target: Target) -> Backend | None:
    """What makes the target's kernels; None while it has none."""
    return backend_of(target.arch)
