"""Numbers of 2 and 4 bits: ONNX's order, and every foreign one there and back."""

import itertools
from typing import get_args

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompiler.ir.errors import ModelError, OptionError
from qcompiler.ir.packing import ONNX, Encoding, PackedFormat, pack, unpack

FORMATS = [
    PackedFormat(*parts) for parts in itertools.product(get_args(Encoding), (2, 4), (False, True))
]
shapes = hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=9)


@st.composite
def formats_and_numbers(draw):
    format = draw(st.sampled_from(FORMATS))
    numbers = st.sampled_from(format.meanings)
    return format, draw(hnp.arrays(np.int8, draw(shapes), elements=numbers))


@given(formats_and_numbers())
def test_every_number_comes_back(case):
    format, numbers = case
    packed = pack(numbers, format)
    assert packed.shape == (*numbers.shape[:-1], -(-numbers.shape[-1] * format.bits // 8))
    back = unpack(packed, numbers.shape[-1], format)
    assert back.dtype == format.storage.numpy()
    np.testing.assert_array_equal(back.astype(np.int8), numbers)


@given(st.sampled_from(FORMATS), hnp.arrays(np.uint8, shapes))
def test_every_byte_comes_back(format, packed):
    numbers = unpack(packed, packed.shape[-1] * 8 // format.bits, format)
    back = pack(numbers, format)
    if format.encoding == "sign-magnitude":  # a negative zero comes back as a positive one
        np.testing.assert_array_equal(unpack(back, numbers.shape[-1], format), numbers)
    else:
        np.testing.assert_array_equal(back, packed)


@given(st.sampled_from(["INT4", "UINT4", "INT2", "UINT2"]), st.data())
def test_the_convention_inside_is_that_of_onnx(name, data):
    dtype = ir.DataType[name]
    format = PackedFormat("unsigned" if name[0] == "U" else "twos-complement", dtype.bitwidth)
    numbers = data.draw(hnp.arrays(np.int8, shapes, elements=st.sampled_from(format.meanings)))
    tensor = ir.Tensor(numbers.astype(dtype.numpy()), dtype=dtype)
    flat = numbers.reshape(-1)  # ONNX begins no byte with a row
    assert pack(flat, format).tobytes() == tensor.tobytes()
    stored = np.frombuffer(tensor.tobytes(), np.uint8)
    np.testing.assert_array_equal(unpack(stored, flat.size, format).astype(np.int8), flat)


@pytest.mark.parametrize(
    ("encoding", "meaning"),
    [
        ("twos-complement", [7, -8, -1, 0]),
        ("unsigned", [7, 8, 15, 0]),
        ("offset", [-1, 0, 7, -8]),
        ("sign-magnitude", [7, 0, -7, 0]),
        ("sign-magnitude-without-negative-zero", [7, -8, -7, 0]),
    ],
)
def test_what_codes_mean(encoding, meaning):
    for high_first, packed in ((False, [0x87, 0x0F]), (True, [0x78, 0xF0])):
        format = PackedFormat(encoding, high_first=high_first)
        numbers = unpack(np.asarray(packed, np.uint8), 4, format)
        assert numbers.astype(int).tolist() == meaning


def test_what_codes_of_two_bits_mean():
    byte = np.asarray([0b11_10_01_00], np.uint8)
    assert unpack(byte, 4, PackedFormat("offset", 2)).astype(int).tolist() == [-2, -1, 0, 1]
    turned = PackedFormat("sign-magnitude", 2, high_first=True)
    assert unpack(byte, 4, turned).astype(int).tolist() == [-1, 0, 1, 0]


def test_a_zero_point_of_8_that_goes_without_saying():
    codes = np.arange(16, dtype=np.uint8)
    packed = pack(codes, PackedFormat("unsigned"))
    offset = unpack(packed, 16, PackedFormat("offset")).astype(int)
    np.testing.assert_array_equal(offset, codes.astype(int) - 8)


@pytest.mark.parametrize(
    ("packed", "length", "message"),
    [
        (np.zeros(2, np.uint8), 5, r"uint8 \[2\]: 5 numbers of 4 bits take 3 bytes"),
        (np.zeros((3, 4), np.uint8), 6, r"uint8 \[3, 4\]: 6 numbers of 4 bits take 3 bytes"),
        (np.zeros(2, np.int8), 4, r"int8 \[2\]: 4 numbers of 4 bits take 2 bytes of uint8"),
        (np.zeros((), np.uint8), 1, r"uint8 \[\]: 1 numbers"),
    ],
)
def test_a_wrong_number_of_bytes_is_refused(packed, length, message):
    with pytest.raises(ModelError, match=message):
        unpack(packed, length, ONNX)


@pytest.mark.parametrize(
    ("number", "format"),
    [
        (8, ONNX),
        (-9, ONNX),
        (-1, PackedFormat("unsigned")),
        (16, PackedFormat("unsigned")),
        (1000, PackedFormat("offset")),
        (-8, PackedFormat("sign-magnitude")),
        (2, PackedFormat("offset", 2)),
        (1.5, ONNX),
        (-0.25, PackedFormat("offset")),
        (float("nan"), ONNX),
        (float("inf"), PackedFormat("unsigned", 2)),
    ],
)
def test_a_number_without_a_code_is_refused(number, format):
    with pytest.raises(ModelError, match=f"^{number} has no code in {format.bits} bits of"):
        pack(np.asarray([0, number]), format)


def test_unknown_formats_are_refused():
    with pytest.raises(OptionError, match="no encoding 'gray'; there are twos-complement"):
        PackedFormat("gray")
    with pytest.raises(OptionError, match="no packing of 3 bits, only of 2 and 4"):
        PackedFormat("offset", 3)
