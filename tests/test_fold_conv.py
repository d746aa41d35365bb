"""fold-qdq on convolutions that others quantized: to one integer op, or left with the reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from golden import run
from test_fold_imported import DYNAMIC, F4, STATIC, STEP, folded, model

from qcompiler.ir.decisions import decision_of
from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.passes.fold_qdq import FoldQDQ
from qcompiler.passes.lift_qoperators import LiftQOperators
from qcompiler.passes.normalize_qdq import NormalizeQDQ

RNG = np.random.default_rng(4)
CONV = {
    "k": RNG.integers(-127, 128, (4, 2, 3, 3)).astype(np.int8), "ks": np.full(4, 0.02, F4),
    "ku": RNG.integers(0, 256, (4, 2, 3, 3)).astype(np.uint8), "kuz": np.uint8(131),
    "kz": np.int8([3, 3, 3, 3]), "kd": np.int8([1, -2, 3, 0]), "kone": F4(0.02),
    "ksmall": RNG.integers(-99, 99, (4, 2, 3, 3)).astype(np.int8),
    "cb": RNG.integers(-900, 900, 4).astype(np.int32), "cbs": np.full(4, 0.02 * 0.03, F4),
    "cf": RNG.standard_normal(4).astype(F4), "cbo": np.full(4, 0.01, F4), "one": F4(1),
    "zero_f": F4(0), "six": F4(6), "sixth": F4(6 / 255), "huge": np.full(4, 1e7, F4),
    "k1": RNG.integers(-127, 128, (4, 2, 3)).astype(np.int8),
    "k3": RNG.integers(-127, 128, (4, 2, 3, 3, 3)).astype(np.int8),
}  # fmt: skip
KERNEL = "f = DequantizeLinear <axis = 0> (k, ks) "
OUT = " r = QuantizeLinear (t, ys, yz) y = DequantizeLinear (r, ys, yz)"


def conv_head(rank: int = 4) -> str:
    names = ",".join("abcde"[:rank])
    sizes = ",".join(map(str, (2, 2, 9, 9, 9)[:rank]))
    return f"g (float[{sizes}] x) => (float[{names}] y) "


def folded_conv(
    body: str, rank: int = 4, steps: float = 1, **changes: Any
) -> tuple[list[str], str]:
    """The ops and what is said of them; results may differ by one step of y at a tie."""
    feeds = {"x": RNG.standard_normal((2, 2, 9, 9, 9)[:rank]).astype(F4)}
    changes = CONV | {"ys": F4(STEP), "yz": np.uint8(128)} | changes
    return folded(STATIC + body, feeds, conv_head(rank), steps, **changes)


WHOLE = ["QuantizeLinear", "QConv", "DequantizeLinear"]


@pytest.mark.parametrize(
    "body",
    [
        KERNEL + "t = Conv (d, f)" + OUT,
        KERNEL + "g = DequantizeLinear <axis = 0> (cb, cbs) t = Conv (d, f, g)" + OUT,
        KERNEL + "g = DequantizeLinear <axis = 0> (cb, cbo) t = Conv (d, f, g)" + OUT,
        KERNEL + "t = Conv (d, f, cf)" + OUT,
        KERNEL + "t = Conv <group = 1, strides = [2,2], pads = [1,0,1,2]> (d, f)" + OUT,
        KERNEL + 't = Conv <auto_pad = "VALID"> (d, f)' + OUT,
        KERNEL + 't = Conv <auto_pad = "SAME_UPPER", strides = [2,2]> (d, f)' + OUT,
        KERNEL + 't = Conv <auto_pad = "SAME_LOWER", strides = [1,2]> (d, f)' + OUT,
        "f = DequantizeLinear (k, kone) t = Conv (d, f)" + OUT,
        "f = DequantizeLinear (ku, kone, kuz) t = Conv (d, f)" + OUT,
        "f = DequantizeLinear <axis = 0> (k, ks, kz) t = Conv (d, f)" + OUT,
        "f = DequantizeLinear <axis = 0> (ksmall, ks, kd) t = Conv (d, f)" + OUT,
    ],
)
def test_convolutions_of_every_kind(body: str) -> None:
    assert folded_conv(body)[0] == WHOLE


@pytest.mark.parametrize(
    "body",
    [
        KERNEL + "y = Conv (d, f)",
        KERNEL + "y = Conv (d, f, cf)",
        KERNEL + "g = DequantizeLinear <axis = 0> (cb, cbs) y = Conv (d, f, g)",
        KERNEL + 'y = Conv <auto_pad = "SAME_UPPER", strides = [2,2]> (d, f)',
        "f = DequantizeLinear (ku, kone, kuz) y = Conv (d, f, cf)",
        "f = DequantizeLinear <axis = 0> (ksmall, ks, kd) y = Conv (d, f)",
    ],
)
def test_a_computed_scale_takes_integer_sums(body: str) -> None:
    feeds = {"x": RNG.standard_normal((2, 2, 9, 9)).astype(F4)}
    ops, why = folded(DYNAMIC + body, feeds, conv_head(), **CONV)
    sums = ["DynamicQuantizeLinear", "ConvInteger", "Cast", "Mul", "Mul"]
    assert [op for op in ops if op != "Add"] == sums
    assert ("Add" in ops) == (", cf)" in body or ", g)" in body)
    assert "ORT's own ConvInteger" in why


PLAIN = "q, s, z = DynamicQuantizeLinear (x) "
ADDED = {
    "added": RNG.integers(-900, 900, (1, 4, 1, 1)).astype(np.int32),
    "bytes": RNG.integers(0, 9, (1, 4, 1, 1)).astype(np.uint8),
}  # fmt: skip
INTEGER_SUMS = ["ConvInteger", "Add", "Cast", "Mul", "Mul"]
UINT8 = "f = DequantizeLinear (ku, kone, kuz) conv = Conv (d, f) "
INTEGERS = "mul = Mul (s, kone) real = DequantizeLinear (added, mul) "


@pytest.mark.parametrize(
    ("body", "integers"),
    [
        (UINT8 + INTEGERS + "y = Add (conv, real)", True),
        (UINT8 + INTEGERS + "y = Add (real, conv)", True),
        # Another scale, integers that are no sums, and two readers.
        (UINT8 + INTEGERS.replace("kone", "sixth") + "y = Add (conv, real)", False),
        (UINT8 + INTEGERS.replace("added", "bytes") + "y = Add (conv, real)", False),
        (UINT8 + INTEGERS + "sum = Add (conv, real) y = Add (sum, conv)", False),
    ],
)
def test_integers_at_the_scale_of_the_sums_are_added_to_them(body: str, integers: bool) -> None:
    feeds = {"x": RNG.standard_normal((2, 2, 9, 9)).astype(F4)}
    ops, _ = folded(DYNAMIC + body, feeds, conv_head(), **CONV, **ADDED)
    assert (ops[-5:] == INTEGER_SUMS) == integers
    assert ("DequantizeLinear" in ops) != integers


def test_integers_added_to_a_convolution_keep_their_bits() -> None:
    text = "i = ConvInteger (q, ku, z, kuz) j = Add (i, added) e = Cast <to = 1> (j) "
    source = model(
        PLAIN + text + "mul = Mul (s, kone) y = Mul (e, mul)", conv_head(), **CONV, **ADDED
    )
    feeds = {"x": RNG.standard_normal((2, 2, 9, 9)).astype(F4)}
    expected = run(source, feeds, plainly=True)
    for step in (Canonicalize(), LiftQOperators(), NormalizeQDQ(), FoldQDQ()):
        step(source)
    assert [node.op_type for node in source.graph][-5:] == INTEGER_SUMS
    np.testing.assert_array_equal(run(source, feeds)[0], expected[0])


@pytest.mark.parametrize("rank", [3, 5])
def test_convolutions_of_one_and_three_dimensions(rank: int) -> None:
    kernel = f"f = DequantizeLinear <axis = 0> (k{rank - 2}, ks) t = Conv (d, f)"
    assert folded_conv(kernel + OUT, rank)[0] == WHOLE


@pytest.mark.parametrize(
    ("between", "step", "zero", "folds"),
    [
        ("t = Relu (c)", STEP, 0, True),
        ("t = Relu (c)", STEP, 1, False),
        ("t = Clip (c, zero_f)", STEP, 0, True),
        ("t = Clip (c, zero_f, six)", 6 / 255, 0, True),
        ("t = Clip (c, zero_f, six)", STEP, 0, False),
        ("t = Clip (c, , six)", 6 / 127, 128, True),
        ("e = Relu (c) t = Clip (e, , six)", 6 / 255, 0, True),
    ],
)
def test_what_saturation_does_needs_no_relu(
    between: str, step: float, zero: int, folds: bool
) -> None:
    changes = {"ys": F4(step), "yz": np.uint8(zero)}
    ops, why = folded_conv(KERNEL + "c = Conv (d, f) " + between + OUT, **changes)
    assert (ops == WHOLE) == folds
    assert folds or "cuts within the range" in why


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (KERNEL + "y = Conv (d, f)", "its result is not quantized: ORT's ConvInteger is slower"),
        (KERNEL + "t = Conv (d, f, huge)" + OUT, "its bias does not fit int32"),
        ("f = DequantizeLinear <axis = 0> (ku, ks, kuz4) t = Conv (d, f)" + OUT, "do not fit int8"),
        ("f = DequantizeLinear <axis = 1> (k, two) t = Conv (d, f)" + OUT, "a scale per axis=1"),
        ("f = Neg (kfloat) t = Conv (d, f)" + OUT, "its weight is not quantized"),
    ],
)
def test_a_convolution_that_is_left_says_why(body: str, reason: str) -> None:
    changes = {"kuz4": np.uint8([130, 131, 132, 133]), "two": np.full(2, 0.02, F4),
               "kfloat": np.ones((4, 2, 3, 3), F4)}  # fmt: skip
    subject = model(STATIC + body, conv_head(), **(CONV | changes))
    FoldQDQ()(subject)
    (conv,) = (node for node in subject.graph if node.op_type == "Conv")
    assert reason in decision_of(conv).why
