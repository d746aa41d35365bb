"""How groups of weights may be stored, and the bits that takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from qcompiler.ir.types import PerAxis, PerGroup, QuantType

KINDS: dict[str, dict[str, Any]] = {
    "int4": {},
    "uint4 with zero points": {"symmetric": False},
    "int4 with float zero points": {"offset": True},
    "int4, int8 scales": {"two_level": True},
    "int4, int8 scales and zero points": {"two_level": True, "offset": True},
    "int3": {"bits": 3},
    "int3 with float zero points": {"bits": 3, "offset": True},
    "int2": {"bits": 2},
    "int2 with float zero points": {"bits": 2, "offset": True},
}
"""How groups are stored, by the name in the table."""

WAYS: dict[str, tuple[str, ...]] = {
    "int4": ("nearest, max", "nearest, mse", "awq", "gptq", "awq_gptq"),
    "uint4 with zero points": ("nearest, max", "awq", "gptq"),
    "int4 with float zero points": ("nearest, max", "hqq", "awq", "gptq"),
    "int4, int8 scales": ("nearest, max", "gptq"),
    "int4, int8 scales and zero points": ("nearest, max", "hqq", "awq", "gptq"),
    "int3": ("nearest, max", "gptq"),
    "int3 with float zero points": ("nearest, max", "gptq"),
    "int2": ("nearest, max", "gptq"),
    "int2 with float zero points": ("nearest, max", "hqq", "gptq"),
}
"""How they are rounded in the table; hqq without float zero points rounds to nearest."""


def type_of(group: int, kind: str, depth: int) -> QuantType:
    """The type of a matrix of `depth` rows; a channel is a group of all of them."""
    storage = ir.DataType.UINT4 if "uint4" in kind else ir.DataType.INT4
    by_axis = not group and not {"offset", "two_level"} & set(KINDS[kind])
    granularity = PerAxis(1) if by_axis else PerGroup(0, group or depth)
    return QuantType(storage, granularity=granularity, **KINDS[kind])


def bits_of_kind(shapes: Sequence[tuple[int, int]], group: int, kind: str) -> float:
    """Bits per weight of layers as they lie in a file for CPUs: scales are float32.

    In float16, as CUDA's are, one of a group of 32 is half a bit less, two of them one.
    """
    two_level, values = KINDS[kind].get("two_level", False), 1 + KINDS[kind].get("offset", False)
    bits = 0
    for k, n in shapes:
        groups = -(-k // group) if group else 1
        bits += KINDS[kind].get("bits", 4) * k * n
        bits += groups * n * values * (8 if two_level else 32)
        bits += groups * n * 4 * ("uint4" in kind) + 32 * n * values * two_level
    return bits / sum(k * n for k, n in shapes)
