"""The reference body of attention, for every order its tensors may come in.

    y = Softmax(q k^T * scale [+ mask]) v

A region's flags say which form it is: the first has a letter for each of q, k, v and y, `h` where
the tensor is [batch, heads, tokens, D] and `s` where it is [batch, tokens, heads, D]; "zero" after
it means that a row of scores whose softmax is NaN, as when all of it is -inf, gives zeros.  "g3"
means that each head of k and v is read by three of q, one after the other (grouped-query
attention).

Two more flags allow a kernel to round what it multiplies; the body stays exact.  How a kernel
rounds depends on how it cuts keys into blocks, so a body that did the same would be slower, no
closer to what was asked for, and different for each kernel.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = [
    "BFLOAT16",
    "HEADS_FIRST",
    "INT8",
    "PRECISIONS",
    "ZERO",
    "attention_body",
    "group_of",
    "grouped",
]

HEADS_FIRST = "hhhh"
"""All four tensors as [batch, heads, tokens, D]."""

ZERO = "zero"
"""The flag of a region whose undefined rows are zeros."""

_SWAP = "Transpose <perm = [0, 2, 1, 3]>"
_TURN = {"h": "Transpose <perm = [0, 1, 3, 2]>", "s": "Transpose <perm = [0, 2, 3, 1]>"}

_GUARD = [
    "undefined = IsNaN (soft)",
    "nothing = Constant <value_float = 0.0> ()",
    "weights = Where (undefined, nothing, soft)",
]


BFLOAT16 = "bf16"
"""The flag of a region whose kernel may round the factors of both products to bfloat16."""

INT8 = "int8"
"""The flag of a region whose kernel may quantize the factors of both products."""

PRECISIONS = {"float32": (), "bfloat16": (BFLOAT16,), "int8": (INT8,)}
"""The flags of what a kernel may round the factors of both products to."""


def grouped(size: int) -> tuple[str, ...]:
    """The flag of a region whose heads of k and v are read by `size` of q each."""
    return (f"g{size}",) if size > 1 else ()


def group_of(flags: Sequence[str]) -> int:
    """The size of `grouped` in a region's flags."""
    return next((int(flag[1:]) for flag in flags if re.fullmatch(r"g\d+", flag)), 1)


def attention_body(flags: Sequence[str], masked: bool) -> str:
    """The lines of a body in ai.onnx ops; the inputs are q, k, v, a scalar scale, and the mask."""
    layout, *others = flags or (HEADS_FIRST,)
    by_head = {name: f"{name}_by_head" for name, letter in zip("qkvy", layout, strict=True)
               if letter == "s"}  # fmt: skip
    query, value, context = (by_head.get(name, name) for name in "qvy")
    scores = "scores" if masked else "scaled"
    weights = "weights" if ZERO in others else "soft"
    size = group_of(others)
    given = {name: f"{name}_repeated" if name in "kv" and size > 1 else name for name in "qkv"}
    value = value if "v" in by_head else given["v"]
    lines = [line for name in "kv" if size > 1 for line in _repeat(name, layout, size)]
    lines += [f"{by_head[name]} = {_SWAP} ({given[name]})" for name in "qv" if name in by_head]
    # A constant scale right after the product is what ORT merges into it.
    lines += [f"turned = {_TURN[layout[1]]} ({given['k']})"]
    lines += [f"product = MatMul ({query}, turned)"]
    lines += ["scaled = Mul (product, scale)"]
    lines += ["scores = Add (scaled, mask)"] if masked else []
    lines += [f"soft = Softmax <axis = -1> ({scores})"]
    lines += _GUARD if ZERO in others else []
    lines += [f"{context} = MatMul ({weights}, {value})"]
    lines += [f"y = {_SWAP} ({context})"] if "y" in by_head else []
    return "".join(f"\n    {line}" for line in lines) + "\n"


def _repeat(name: str, layout: str, size: int) -> list[str]:
    """The lines that make `size` of each head of k or v."""
    axis = 1 if layout["qkv".index(name)] == "h" else 2
    copies = [1] * 5
    copies[axis + 1] = size
    return [
        f"{name}_axis = Constant <value_ints = [{axis + 1}]> ()",
        f"{name}_apart = Unsqueeze ({name}, {name}_axis)",
        f"{name}_copies = Constant <value_ints = {copies}> ()",
        f"{name}_expanded = Expand ({name}_apart, {name}_copies)",
        f"{name}_before = Shape <start = 0, end = {axis}> ({name})",
        f"{name}_heads = Shape <start = {axis}, end = {axis + 1}> ({name})",
        f"{name}_group = Constant <value_ints = [{size}]> ()",
        f"{name}_all_heads = Mul ({name}_heads, {name}_group)",
        f"{name}_after = Shape <start = {axis + 1}, end = 4> ({name})",
        f"{name}_sizes = Concat <axis = 0> ({name}_before, {name}_all_heads, {name}_after)",
        f"{name}_repeated = Reshape <allowzero = 1> ({name}_expanded, {name}_sizes)",
    ]
