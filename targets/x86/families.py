"""The families of kernels: how a region of each anchor op becomes a C function.

One row per anchor.  Nothing here imports tvm; a row's generator does when it is called.
"""

from __future__ import annotations

from typing import Any

from qcompiler.ir.attention import INT8
from qcompiler.ir.dialect import OPS
from qcompiler.ir.region import Region
from qcompiler.targets.x86.attention_shape import MAX_DEPTH as MAX_HEAD
from qcompiler.targets.x86.attention_shape import attention_shape, int8_attention_shape
from qcompiler.targets.x86.family import FAST, Family
from qcompiler.targets.x86.isa import AVX512_BF16, AVX512_VNNI, Isa
from qcompiler.targets.x86.w4_family import W4_FAMILIES
from qcompiler.targets.x86.w8_family import W8_FAMILIES

__all__ = ["FAMILIES", "norm_operands"]


def _generate_quantize(region: Region, isa: Isa) -> Any:
    from qcompiler.targets.x86.quantize import quantize_function

    is_smoothed, is_fast = bool(region.extras), FAST in region.flags
    return quantize_function(region.size("K"), isa, is_smoothed=is_smoothed, is_fast=is_fast)


def _generate_norm(region: Region, isa: Isa) -> Any:
    from qcompiler.targets.x86.norm import norm_function

    return norm_function(region, isa)


def _generate_attention(region: Region, isa: Isa) -> Any:
    from qcompiler.targets.x86.attention import attention_function
    from qcompiler.targets.x86.attention_bf16 import attention_bf16_function
    from qcompiler.targets.x86.attention_int8 import attention_int8_function

    d, is_masked = region.size("D"), region.anchor == "MaskedAttention"
    if isa == AVX512_BF16:
        return attention_bf16_function(d, is_masked=is_masked)
    if _multiplies_int8(region, isa):
        return attention_int8_function(d, is_masked=is_masked)
    return attention_function(d, isa=isa, is_masked=is_masked)


def _unsupported_quantize(region: Region) -> str | None:
    if region.steps or region.extras != (("channel",) if "smoothed" in region.flags else ()):
        return "Quantize takes no epilogue"
    return None


def _unsupported_norm(region: Region) -> str | None:
    if region.steps or region.extras != (("channel",) if region.flags else ()):
        return f"{region.anchor} takes no epilogue"
    if not region.outputs or ("q" in region.outputs) != ("s" in region.outputs):
        return f"{region.anchor} has the outputs x, y, and q with s, not {region.outputs}"
    return None


def _unsupported_attention(region: Region) -> str | None:
    if region.extras or region.steps:
        return f"{region.anchor} takes no epilogue"
    if region.size("D") > MAX_HEAD:
        return f"heads of {region.size('D')}; at most {MAX_HEAD} are supported"
    return None


def _quantize_parameters(region: Region, isa: Isa) -> list[tuple[str, str]]:
    return [
        ("const float *", "a->x"),
        *((("const float *", "a->smoothing"),) if region.extras else ()),
        ("uint8_t *", "a->q"),
        ("float *", "a->s"),
        ("int32_t", "a->rows"),
        ("int32_t", "a->x_stride"),
    ]


def norm_operands(region: Region) -> list[str]:
    """The pointers a kernel of a norm takes: its inputs and outputs, by their names in the op.

    `smoothing` is the extra operand that the result is multiplied by before it is quantized.
    """
    return [*_norm_inputs(region), *region.outputs]


def _norm_inputs(region: Region) -> list[str]:
    return [*OPS[region.anchor].inputs, *(["smoothing"] if region.flags else [])]


def _norm_parameters(region: Region, isa: Isa) -> list[tuple[str, str]]:
    inputs = [("const float *", f"a->{name}") for name in _norm_inputs(region)]
    outputs = [("uint8_t *" if name == "q" else "float *", f"a->{name}") for name in region.outputs]
    return [*inputs, *outputs, ("int32_t", "a->rows")]


def _attention_parameters(region: Region, isa: Isa) -> list[tuple[str, str]]:
    inputs = [("const float *", f"a->{name}") for name in ("q", "k", "v", "mask")]
    numbers = ("q_stride", "k_stride", "v_stride", "y_stride", "mask_row_stride", "mask_step",
               "rows", "keys", "zero_empty")  # fmt: skip
    integers = [("int32_t", f"a->{name}") for name in numbers]
    return [*inputs, ("float *", "a->y"), *integers, ("float", "a->scale")]


def _attention_constants(region: Region, isa: Isa) -> dict[str, int]:
    shape = int8_attention_shape if _multiplies_int8(region, isa) else attention_shape
    return {"block_rows": shape(region.size("D")).rows}


def _multiplies_int8(region: Region, isa: Isa) -> bool:
    return INT8 in region.flags and isa == AVX512_VNNI


def _norm(anchor: str) -> Family:
    return Family(("K",), anchor, "norm", _norm_parameters, _unsupported_norm, _generate_norm)


def _attention(anchor: str) -> Family:
    return Family(
        ("D",),
        anchor,
        "attention",
        _attention_parameters,
        _unsupported_attention,
        _generate_attention,
        _attention_constants,
    )


FAMILIES = {
    "Quantize": Family(
        ("K",),
        "qc_quantize",
        "quantize",
        _quantize_parameters,
        _unsupported_quantize,
        _generate_quantize,
    ),
    **W8_FAMILIES,
    **W4_FAMILIES,
    "LayerNorm": _norm("qc_layer_norm"),
    "AddLayerNorm": _norm("qc_add_layer_norm"),
    "RMSNorm": _norm("qc_rms_norm"),
    "AddRMSNorm": _norm("qc_add_rms_norm"),
    "Attention": _attention("qc_attention"),
    "MaskedAttention": _attention("qc_masked_attention"),
}
