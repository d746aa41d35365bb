"""The reference body of attention, for every order its tensors may come in.

    y = Softmax(q k^T * scale [+ mask]) v

A region's flags say which form it is: the first has a letter for each of q, k, v and y, `h` where
the tensor is [batch, heads, tokens, D] and `s` where it is [batch, tokens, heads, D]; "zero" after
it means that a row of scores whose softmax is NaN, as when all of it is -inf, gives zeros.

Two more flags allow a kernel to round what it multiplies; the body stays exact.  How a kernel
rounds depends on how it cuts keys into blocks, so a body that did the same would be slower, no
closer to what was asked for, and different for each kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["BFLOAT16", "HEADS_FIRST", "INT8", "PRECISIONS", "ZERO", "attention_body"]

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


def attention_body(flags: Sequence[str], masked: bool) -> str:
    """The lines of a body in ai.onnx ops; the inputs are q, k, v, a scalar scale, and the mask."""
    layout, *others = flags or (HEADS_FIRST,)
    by_head = {name: f"{name}_by_head" for name, letter in zip("qkvy", layout, strict=True)
               if letter == "s"}  # fmt: skip
    query, value, context = (by_head.get(name, name) for name in "qvy")
    scores = "scores" if masked else "scaled"
    weights = "weights" if ZERO in others else "soft"
    lines = [f"{by_head[name]} = {_SWAP} ({name})" for name in "qv" if name in by_head]
    # A constant scale right after the product is what ORT merges into it.
    lines += [f"turned = {_TURN[layout[1]]} (k)", f"product = MatMul ({query}, turned)"]
    lines += ["scaled = Mul (product, scale)"]
    lines += ["scores = Add (scaled, mask)"] if masked else []
    lines += [f"soft = Softmax <axis = -1> ({scores})"]
    lines += _GUARD if ZERO in others else []
    lines += [f"{context} = MatMul ({weights}, {value})"]
    lines += [f"y = {_SWAP} ({context})"] if "y" in by_head else []
    return "".join(f"\n    {line}" for line in lines) + "\n"
