"""Quantized types: their ranges, what cannot be, and texts that parse back."""

import dataclasses
import itertools

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from qcompiler.ir.arithmetic import broadcast_scale, dequantize, quantize
from qcompiler.ir.codebooks import CODEBOOKS, FP4, NF4, Codebook
from qcompiler.ir.errors import OptionError
from qcompiler.ir.granularity import parse_granularity
from qcompiler.ir.packing import PackedFormat
from qcompiler.ir.types import PerAxis, PerGroup, PerTensor, QuantSpec, QuantType

INT8, UINT8, INT4, UINT4 = (ir.DataType[name] for name in ("INT8", "UINT8", "INT4", "UINT4"))
FP8 = ir.DataType.FLOAT8E4M3FN

finite = st.floats(allow_nan=False, allow_infinity=False)
codebooks = st.sampled_from([NF4, FP4]) | st.builds(
    Codebook,
    st.from_regex(r"[a-z_][a-z0-9_]*", fullmatch=True),
    st.lists(finite, min_size=1, max_size=20).map(lambda values: (*values, 1.0)),
)
granularities = st.one_of(
    st.just(PerTensor()),
    st.builds(PerAxis, st.integers(-8, 8)),
    st.builds(PerGroup, st.integers(-8, 8), st.integers(1, 4096)),
)


@st.composite
def quant_types(draw):
    """Any type that can be."""
    expressed = draw(st.sampled_from(["FLOAT", "FLOAT16", "BFLOAT16"]).map(ir.DataType.__getitem__))
    granularity = draw(granularities)
    kind = draw(st.sampled_from(["codebook", "float", "int"]))
    if kind == "codebook":
        book = draw(codebooks)
        return QuantType(book.storage, expressed, granularity, codebook=book)
    if kind == "float":
        storage = draw(st.sampled_from([FP8, ir.DataType.FLOAT8E5M2]))
        return QuantType(storage, expressed, granularity)
    name = draw(st.sampled_from(["INT2", "INT4", "INT8", "INT16", "INT32"]))
    signed = name == "INT32" or draw(st.booleans())
    return QuantType(
        ir.DataType[name if signed else f"U{name}"],
        expressed,
        granularity,
        symmetric=name == "INT32" or draw(st.booleans()),
        narrow_range=signed and draw(st.booleans()),
        bits=None if name == "INT2" else draw(st.sampled_from([None, 2, 3])),
    )


@given(quant_types())
def test_two_levels_are_of_groups_of_rows(type):
    grouped = isinstance(type.granularity, PerGroup) and type.granularity.axis in (0, -2)
    if type.symmetric and type.expressed is ir.DataType.FLOAT and grouped:
        two = dataclasses.replace(type, two_level=True)
        assert QuantType.parse(str(two)) == two != type
        return
    with pytest.raises(OptionError, match="only float scales of groups of rows, without zero"):
        dataclasses.replace(type, two_level=True)


@given(quant_types(), st.sampled_from(["static", "dynamic"]))
def test_texts_parse_back(type, scale):
    assert QuantType.parse(str(type)) == type
    spec = QuantSpec(type, scale)
    assert QuantSpec.parse(str(spec)) == spec


@given(quant_types(), quant_types())
def test_texts_tell_types_apart(one, other):
    assert (str(one) == str(other)) == (one == other)


def test_the_text_form():
    groups = QuantType(INT4, granularity=PerGroup(0, 32))
    assert str(QuantSpec(groups, "dynamic")) == "dynamic quant<int4:float, axis=0/32>"
    half = QuantType(INT8, ir.DataType.FLOAT16, PerAxis(1), symmetric=False, narrow_range=True)
    assert str(half) == "quant<int8:float16, axis=1, asymmetric, narrow>"
    assert str(QuantType(UINT4, codebook=NF4)) == "quant<nf4:float, tensor>"
    ternary = Codebook("ternary", (-1.0, 0.0, 1.0))
    assert str(QuantType(ternary.storage, codebook=ternary)) == (
        "quant<ternary[-1.0 0.0 1.0]:float, tensor>"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int8", r"no quantized type: 'int8'; write quant<STORAGE:EXPRESSED, GRANULARITY>"),
        ("quant<int8:float>", "no quantized type"),
        ("quant<int8:float, tensor, narrow, asymmetric>", "no quantized type"),
        ("quant<imt8:float, tensor>", "no storage type 'imt8'; did you mean 'int8'.*nf4, fp4"),
        ("quant<int8:double, tensor>", "in 'quant<.*': no expressed type 'double'.*float16"),
        ("quant<int8:float, row>", "no granularity 'row': write tensor, axis=1 or axis=0/32"),
        ("quant<int8:float, axis=0/0>", "group size 0: a group has 1 element or more"),
        ("quant<uint8:float, tensor, narrow>", "only signed integers have a narrow range"),
        ("quant<int4:float, tensor, bits=5>", "5 bits: must be 2 or more, and fewer than INT4"),
        ("quant<nf4:float, tensor, asymmetric>", "a codebook has no zero point"),
        ("quant<mine[0.0 x]:float, tensor>", "could not convert string to float: 'x'"),
        ("quant<mine[1.0]:float, tensor>", "codebook 'mine' has 1 values, it needs 2 to 256"),
    ],
)
def test_a_wrong_text_says_what_is_wrong(text, message):
    with pytest.raises(OptionError, match=message):
        QuantType.parse(text)


def test_a_wrong_spec_says_what_is_wrong():
    with pytest.raises(OptionError, match=r"no scale 'quant<int8:float,': write static or dynamic"):
        QuantSpec.parse("quant<int8:float, tensor>")
    with pytest.raises(OptionError, match="no scale 'sometimes': it is static or dynamic"):
        QuantSpec(QuantType(INT8), "sometimes")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantType(ir.DataType.INT64), "no storage type INT64; there are int2"),
        (lambda: QuantType(INT8, ir.DataType.DOUBLE), "cannot stand for DOUBLE, only for float"),
        (lambda: QuantType(UINT8, narrow_range=True), "only signed integers"),
        (lambda: QuantType(FP8, narrow_range=True), "only signed integers"),
        (lambda: QuantType(INT4, bits=4), "4 bits: must be 2 or more, and fewer than INT4 has"),
        (lambda: QuantType(FP8, bits=3), "only integers have fewer bits"),
        (lambda: QuantType(FP8, symmetric=False), "FLOAT8E4M3FN has no zero point in ONNX"),
        (lambda: QuantType(ir.DataType.INT32, symmetric=False), "INT32 has no zero point"),
        (lambda: QuantType(UINT4, symmetric=False, codebook=NF4), "a codebook has no zero point"),
        (lambda: QuantType(UINT8, codebook=NF4), "indices of nf4 are UINT4"),
        (lambda: PerGroup(0, 0), "group size 0"),
        (lambda: PerAxis(2).scale_shape((3, 4)), r"axis 2 of a tensor of shape \[3, 4\]"),
        (lambda: QuantType("int8"), "storage 'int8' is no onnx_ir.DataType: write .*DataType.INT8"),
        (
            lambda: QuantType("imt8"),
            "storage 'imt8' is no .*; did you mean 'int8'.; there are",
        ),
        (lambda: QuantType(np.uint8), "storage .*uint8.* write onnx_ir.DataType.UINT8"),
        (lambda: QuantType(None), "storage None is no onnx_ir.DataType; there are int2"),
        (lambda: QuantType(INT8, "float"), "expressed 'float' is no .*: write .*DataType.FLOAT$"),
        (
            lambda: QuantType(INT8, granularity="tensor"),
            "granularity 'tensor' is no PerTensor",
        ),
        (lambda: QuantType(INT8, granularity=PerTensor), "granularity .*PerTensor.* is no PerTens"),
        (lambda: QuantType(INT8, symmetric="no"), "symmetric 'no' is neither True nor False"),
        (lambda: QuantType(INT4, bits="3"), "bits '3': it is a whole number"),
        (lambda: QuantType(INT4, bits=True), "bits True: it is a whole number"),
        (lambda: QuantType(INT4, two_level=1), "two_level 1 is neither True nor False"),
        (lambda: QuantType(INT8, narrow_range=1), "narrow_range 1 is neither True nor False"),
        (lambda: QuantType(UINT4, codebook="nf4"), "codebook 'nf4' is no Codebook"),
        (lambda: QuantType.parse(None), "no quantized type: None; write quant<"),
        (lambda: QuantSpec("int8", "static"), "no type 'int8': it is a QuantType"),
        (lambda: QuantSpec.parse(8), "no scale 8: write static or dynamic first"),
        (lambda: PerAxis("1"), "axis '1': it is a whole number"),
        (lambda: PerAxis(True), "axis True: it is a whole number"),
        (lambda: PerAxis(1.0), "axis 1.0: it is a whole number"),
        (lambda: PerGroup(None, 32), "axis None: it is a whole number"),
        (lambda: PerGroup(0, 2.5), "group size 2.5: it is a whole number"),
        (lambda: PerGroup(0, "32"), "group size '32': it is a whole number"),
        (lambda: PackedFormat(bits=4.0), "no packing of 4.0 bits, only of 2 and 4"),
        (lambda: PackedFormat(high_first="yes"), "high_first 'yes' is neither True nor False"),
        (lambda: parse_granularity(0), "no granularity 0: write tensor"),
        (lambda: Codebook(5, (0.0, 1.0)), "codebook 5: the name must be an identifier"),
        (lambda: Codebook("a", 1.0), "codebook 'a': its values are no floats"),
        (lambda: Codebook("a", (0.0, "x")), "codebook 'a': its values are no floats: .*'x'"),
        (lambda: Codebook.parse(4), "no codebook 4; known are nf4, fp4"),
        (lambda: Codebook("a b", (0.0, 1.0)), "the name must be an identifier"),
        (lambda: Codebook("a", (0.0, float("nan"))), "holds nan, all values must be finite"),
        (lambda: Codebook("a", (0.0, -1.0)), "has no value above 0"),
        (lambda: Codebook.parse("nf5"), "no codebook 'nf5'; did you mean 'nf4'"),
    ],
)
def test_refuses_what_cannot_be(make, message):
    with pytest.raises(OptionError, match=message):
        make()


@pytest.mark.parametrize(
    ("type", "range_", "middle"),
    [
        (QuantType(INT8), (-128, 127), 0),
        (QuantType(INT8, narrow_range=True), (-127, 127), 0),
        (QuantType(UINT8), (0, 255), 128),
        (QuantType(INT4), (-8, 7), 0),
        (QuantType(INT4, bits=3), (-4, 3), 0),
        (QuantType(UINT4, bits=2), (0, 3), 2),
        (QuantType(ir.DataType.UINT2), (0, 3), 2),
        (QuantType(ir.DataType.INT16), (-32768, 32767), 0),
        (QuantType(FP8), (-448, 448), 0),
        (QuantType(ir.DataType.FLOAT8E5M2), (-57344, 57344), 0),
        (QuantType(UINT4, codebook=NF4), (-1, 1), 0),
        (QuantType(UINT4, codebook=FP4), (-6, 6), 0),
    ],
)
def test_ranges(type, range_, middle):
    assert type.range == range_
    assert type.middle == middle


def test_numbers_of_numpy_are_numbers():
    assert PerGroup(np.int64(-1), np.int32(4)) == PerGroup(-1, 4)
    assert repr(PerAxis(np.int64(1))) == "PerAxis(axis=1)"


@pytest.mark.parametrize(
    ("granularity", "shape", "message"),
    [
        (
            PerTensor(),
            (3,),
            r"shape \[3\], per tensor of a tensor .* they have \[\]",
        ),
        (PerAxis(0), (10,), r"shape \[10\], per axis=0 of a tensor .* they have \[3\]"),
        (PerGroup(1, 4), (3, 2), r"shape \[3, 2\], per axis=1/4 of a tensor .* they have \[3, 3\]"),
        (PerGroup(1, 4), (1, 3), r"they have \[3, 3\]"),  # would broadcast
        (PerGroup(1, 4), (3, 4), r"they have \[3, 3\]"),  # would be cut
        (PerAxis(2), (3,), "axis 2 of a tensor of shape"),
    ],
)
def test_scales_that_do_not_fit(granularity, shape, message):
    type = QuantType(INT8, granularity=granularity)
    scale = np.ones(shape, np.float32)
    with pytest.raises(OptionError, match=message):
        quantize(np.ones((3, 10), np.float32), scale, type)
    with pytest.raises(OptionError, match=message):
        dequantize(np.ones((3, 10), np.int8), scale, type)
    if granularity != PerTensor():
        with pytest.raises(OptionError, match=message):
            broadcast_scale(np.zeros(shape, np.int8), (3, 10), granularity)


def test_scale_shapes_round_up_to_whole_groups():
    assert PerTensor().scale_shape((3, 10)) == ()
    assert PerAxis(-1).scale_shape((3, 10)) == (10,)
    assert PerGroup(-1, 4).scale_shape((3, 10)) == (3, 3)
    assert PerGroup(0, 4).scale_shape((3, 10)) == (1, 10)


def test_nf4_is_made_of_the_quantiles_of_a_normal_distribution():
    # 8 quantiles above 0 and 7 below, evenly spaced in probability and scaled to -1..1; the
    # outermost leave 1/32 and 1/30 of the mass outside, averaged.
    last = 1 - (1 / 32 + 1 / 30) / 2
    above = norm.ppf(np.linspace(last, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(last, 0.5, 8)[:-1])
    values = np.sort([*above, 0.0, *below])
    np.testing.assert_allclose(NF4.values, values / values.max(), atol=1e-6)


def test_fp4_is_e2m1():
    bits = np.arange(16, dtype=np.uint8).view(ir.DataType.FLOAT4E2M1.numpy())
    np.testing.assert_array_equal(FP4.values, bits.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(FP4.values), np.signbit(bits.astype(np.float32)))


@pytest.mark.parametrize("book", [*CODEBOOKS.values(), Codebook("odd", (3.0, -2.0, 0.25))])
def test_the_nearest_entry_is_found(book):
    entries = np.asarray(book.values)
    for value in entries:
        assert entries[book.nearest(np.asarray(value))] == value
    numbers = np.linspace(-8, 8, 1001)
    distance = np.abs(entries[book.nearest(numbers)] - numbers)
    np.testing.assert_array_equal(distance, np.abs(entries - numbers[:, None]).min(axis=1))


def test_half_way_between_two_entries():
    odd, order = Codebook("odd", (-2.0, 4.0, 2.0, -4.0, 0.0)), (-4.0, -2.0, 0.0, 2.0, 4.0)
    halves = [(a + b) / 2 for a, b in itertools.pairwise(order)]
    # Even indices are 0 (-2.0), 2 (2.0) and 4 (0.0): an even one wins, else the one far from 0.
    assert [odd.values[i] for i in odd.nearest(np.asarray(halves))] == [-2.0, -2.0, 2.0, 2.0]
    assert [FP4.values[i] for i in FP4.nearest(np.asarray([0.25, 0.75, 2.5, 5.0]))] == [0, 1, 2, 4]
    assert list(FP4.nearest(np.asarray([0.0, -0.0, np.nan, np.inf, -np.inf]))) == [0, 8, 15, 7, 15]


def test_a_codebook_of_numpy_floats_has_a_text_that_parses_back():
    book = Codebook("c", tuple(np.asarray([0.1, 1], np.float32)))
    assert Codebook.parse(str(book)) == book
    assert book == Codebook("c", [float(np.float32(0.1)), 1])
    assert hash(book) == hash(Codebook.parse(str(book)))


def test_bits_of_two_digits_parse_back():
    kind = QuantType(ir.DataType.INT16, bits=12)
    assert QuantType.parse(str(kind)) == kind and kind.range == (-2048, 2047)
