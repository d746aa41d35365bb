"""Kernels of norms with the Quantize after them: which there are, and how they are launched.

Nothing here imports tvm.  A thread keeps its part of a row in registers, up to 32 elements, so that
a row is read once; of a norm whose result nobody quantizes, ONNX Runtime's own kernels do the same.
"""

from __future__ import annotations

from qcompiler.ir.region import Region
from qcompiler.targets.cuda.launch import Launch, row_launches

__all__ = ["NORMS", "norm_launches", "norm_pointers", "quantizes_to_fp8", "unsupported_norm"]

_INT8_NORMS = ("LayerNorm", "AddLayerNorm", "RMSNorm", "AddRMSNorm")
NORMS = (*_INT8_NORMS, *(f"{norm}Fp8" for norm in _INT8_NORMS))
"""The anchor ops."""

_WARP, _VECTOR, _MOST_VECTORS, _MOST_THREADS = 32, 8, 4, 1024
_LONGEST = _VECTOR * _MOST_VECTORS * _MOST_THREADS


def quantizes_to_fp8(region: Region) -> bool:
    """Whether it quantizes to e4m3."""
    return region.anchor.endswith("Fp8")


def unsupported_norm(region: Region) -> str | None:
    """Why a norm in float16 has no kernel, or None when it has one."""
    k = region.size("K")
    if k > _LONGEST:
        return f"K={k}: a block holds rows of up to {_LONGEST} elements in registers"
    if "q" not in region.outputs:
        return "no Quantize follows: ONNX Runtime's own kernels of norms are left to do it"
    if region.steps or region.extras != (("channel",) if "smoothed" in region.flags else ()):
        return f"{region.anchor} takes no epilogue"
    return None


def norm_pointers(region: Region) -> dict[str, str]:
    """Parameters of a kernel, by name, with their types."""
    operands = ("a", "b") if region.anchor.startswith("Add") else ("x",)
    parameters = ("gamma", "beta") if "LayerNorm" in region.anchor else ("gamma",)
    extras = tuple(f"extra{i}" for i in range(len(region.extras)))
    names = dict.fromkeys((*operands, *parameters, *extras, *region.outputs))
    return {name: {"q": "uint8", "s": "float32"}.get(name, "float16") for name in names}


def norm_launches(region: Region) -> tuple[Launch, ...]:
    """As many threads as a row fills at 16 elements each, or needs at 32."""
    k = region.size("K")
    few = min(256, -(-k // (2 * _VECTOR * _WARP)) * _WARP)
    threads = max(few, -(-k // (_MOST_VECTORS * _VECTOR * _WARP)) * _WARP)
    return row_launches(region, threads, (*sorted(norm_pointers(region)), "rows"))
