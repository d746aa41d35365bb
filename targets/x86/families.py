"""The families of kernels: how a region of each anchor op becomes a C function.

One row per anchor.  Nothing here imports tvm; a row's generator does when it is called.
"""

from __future__ import annotations

from typing import Any

from qcompiler.ir.attention import INT8
from qcompiler.ir.dialect import OPS
from qcompiler.ir.joined_regions import quantizing_parts, requantized_parts
from qcompiler.ir.region import Region
from qcompiler.targets.epilogue import unsupported_epilogue
from qcompiler.targets.x86.attention_shape import MAX_DEPTH as MAX_HEAD
from qcompiler.targets.x86.attention_shape import attention_shape, int8_attention_shape
from qcompiler.targets.x86.family import MAX_ELEMENTS, Family, misfit_of_results
from qcompiler.targets.x86.isa import AVX2, AVX512_BF16, AVX512_VNNI, AVX_VNNI, Isa
from qcompiler.targets.x86.tile import tile_shape
from qcompiler.targets.x86.w4_family import W4_FAMILIES

__all__ = ["FAMILIES", "differences", "most_lacking", "norm_operands"]

MAX_QUANTIZED_DEPTH = 4096
"""A tile of such rows fits the 64 KiB that DynamicQMatMulW8A8 quantizes into."""
MAX_QUANTIZED_WIDTH = 1024
"""Beyond this many columns quantizing is little of the work, and panels of weights that many rows
share in an L1 matter more: 128 x 1536 x 384 takes 4% longer in one op."""
MAX_CACHED_WEIGHTS = 768 << 10
"""Bytes of weights that an L2 of 1 MiB holds beside a block of activations."""
MAX_DEPTH = (1 << 31) // (128 * 128) - 1
"""The longest sum of int8 products that an int32 surely holds."""
MAX_ASYMMETRIC_DEPTH = {
    "QMatMulU8S8": (1 << 31) // (255 * 128) - 1,
    "QMatMulU8U8": (1 << 31) // (255 * 255) - 1,
}
"""The same where a zero point of 0 or 255 makes factors as large as 255."""


def _generate_quantize(region: Region, isa: Isa) -> Any:
    from qcompiler.targets.x86.quantize import quantize_function

    return quantize_function(region.size("K"), isa, is_smoothed=bool(region.flags))


def _generate_norm(region: Region, isa: Isa) -> Any:
    from qcompiler.targets.x86.norm import norm_function

    return norm_function(region, isa)


def _generate_qmatmul(region: Region, isa: Isa) -> Any:
    from qcompiler.targets.x86.qmatmul import qmatmul_function

    return qmatmul_function(region, isa)


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
    if region.steps or region.extras != (("channel",) if region.flags else ()):
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


def _unsupported_qmatmul(region: Region) -> str | None:
    k, n = region.size("K"), region.size("N")
    deepest = MAX_ASYMMETRIC_DEPTH.get(region.anchor, MAX_DEPTH)
    if k > deepest:
        return f"K={k}: an int32 sum of more than {deepest} products may overflow"
    columns = tile_shape(n).columns
    panels = [tile_shape(n, isa).columns for isa in FAMILIES[region.anchor].isas]
    if (reason := misfit_of_results(region, panels)) is not None:
        return reason
    if -(-n // columns) * columns * -(-k // 4) * 4 > MAX_ELEMENTS:
        return f"{k} x {n} weights take more than 2^30 bytes"
    return unsupported_epilogue(region)


def _unsupported_dynamic(region: Region) -> str | None:
    k, n = region.size("K"), region.size("N")
    if k > MAX_QUANTIZED_DEPTH:
        return f"K={k}: rows of more than {MAX_QUANTIZED_DEPTH} are quantized first"
    if n > MAX_QUANTIZED_WIDTH:
        return f"N={n}: products of more than {MAX_QUANTIZED_WIDTH} columns are quantized first"
    if k * n > MAX_CACHED_WEIGHTS:
        return f"{k} x {n} weights do not stay in a cache while few rows at a time are multiplied"
    return _unsupported_qmatmul(region)


def _unsupported_windowed(region: Region) -> str | None:
    if region.size("K") % region.size("R"):
        return f"rows of {region.size('K')} are no windows of {region.size('R')} rows"
    return _unsupported_dynamic(region)


def _unsupported_requantized(region: Region) -> str | None:
    n = region.size("N")
    if region.widths or region.is_quantized or region.outputs[-2:] != ("yq", "ys"):
        return "one result of floats is quantized"
    if n > MAX_QUANTIZED_DEPTH:
        return f"N={n}: rows of more than {MAX_QUANTIZED_DEPTH} are quantized later"
    return _unsupported_qmatmul(region)


def _quantize_parameters(region: Region, isa: Isa) -> list[tuple[str, str]]:
    return [
        ("const float *", "a->x"),
        *((("const float *", "a->smoothing"),) if region.flags else ()),
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


def _qmatmul_parameters(region: Region, isa: Isa) -> list[tuple[str, str]]:
    return [
        ("const uint8_t *", "a->q"),
        ("const float *", "a->s"),
        ("const int8_t *", "a->weights"),
        ("const int32_t *", "a->init"),
        *(
            (f"const {'uint16_t' if name == 'groups' else 'int32_t'} *", f"a->excess.{name}")
            for name in ("counts", "groups", "values")
            if most_lacking(region.anchor, isa)
        ),
        ("const float *", "a->ws"),
        *(("const int32_t *", f"a->{name}") for name in differences(region, isa)),
        *(("const float *", f"a->extra[{i}]") for i in range(len(region.extras))),
        ("uint8_t *" if region.is_quantized else "float *", "a->y"),
        ("int32_t", "a->rows"),
        ("int32_t", "a->panel_begin"),
        ("int32_t", "a->panel_end"),
        *((("int32_t", "a->y_columns"), ("int32_t", "a->y_first")) if region.widths else ()),
    ]


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


def _qmatmul_constants(region: Region, isa: Isa) -> dict[str, int]:
    tile = tile_shape(region.size("N"), isa)
    most = most_lacking(region.anchor, isa)
    splits = {"most_lacking": most} if most else {}
    return {"tile_rows": tile.rows, "tile_vectors": tile.vectors} | splits


def most_lacking(anchor: str, isa: Isa) -> int:
    """How many numbers two groups of four may lack of the `SplitRows` that a product reads, or 0.

    Two elements are up to 2 * 127 above a zero point of 128, and 2 * 255 above another; 127 of that
    can be multiplied at once.
    """
    if isa != AVX2:
        return 0
    return 9 if anchor in MAX_ASYMMETRIC_DEPTH else 3


def differences(region: Region, isa: Isa) -> tuple[str, ...]:
    """What is subtracted from sums: products of a number of each row and one of each column.

    `SplitRows` of activations with a zero point of their own may be less another number than that.
    """
    asymmetric = region.anchor in MAX_ASYMMETRIC_DEPTH
    centres = ("offsets", "column_sums") if asymmetric and isa == AVX2 else ()
    zero_points = ("row_sums", "wz") if region.anchor == "QMatMulU8U8" else ()
    return centres + zero_points


def _qmatmul(anchor: str) -> Family:
    return Family(
        ("K", "N"),
        anchor,
        "qmatmul",
        _qmatmul_parameters,
        _unsupported_qmatmul,
        _generate_qmatmul,
        _qmatmul_constants,
        (AVX512_VNNI, AVX_VNNI, AVX2),
    )


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
    "QMatMulW8A8": _qmatmul("qc_qmatmul_w8a8"),
    "QMatMulU8S8": _qmatmul("qc_qmatmul_u8s8"),
    "QMatMulU8U8": _qmatmul("qc_qmatmul_u8u8"),
    "DynamicQMatMulW8A8": Family(
        ("K", "N"),
        "qc_dynamic_qmatmul_w8a8",
        "qmatmul",
        _qmatmul_parameters,
        _unsupported_dynamic,
        None,
        _qmatmul_constants,
        (AVX512_VNNI, AVX_VNNI, AVX2),
        quantizing_parts,
    ),
    "WindowedQMatMulW8A8": Family(
        ("K", "N", "R", "S"),
        "qc_windowed_qmatmul_w8a8",
        "qmatmul",
        _qmatmul_parameters,
        _unsupported_windowed,
        None,
        _qmatmul_constants,
        (AVX512_VNNI, AVX_VNNI, AVX2),
        quantizing_parts,
    ),
    "RequantizedQMatMulW8A8": Family(
        ("K", "N"),
        "qc_requantized_qmatmul_w8a8",
        "qmatmul",
        _qmatmul_parameters,
        _unsupported_requantized,
        None,
        _qmatmul_constants,
        (AVX512_VNNI, AVX_VNNI, AVX2),
        requantized_parts,
    ),
    **W4_FAMILIES,
    "LayerNorm": _norm("qc_layer_norm"),
    "AddLayerNorm": _norm("qc_add_layer_norm"),
    "RMSNorm": _norm("qc_rms_norm"),
    "AddRMSNorm": _norm("qc_add_rms_norm"),
    "Attention": _attention("qc_attention"),
    "MaskedAttention": _attention("qc_masked_attention"),
}
