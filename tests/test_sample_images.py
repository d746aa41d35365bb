"""Images as samples: sizes, types, colours, and what is wrong with them."""

import numpy as np
import pytest
from model_inputs import TWO, Input, X, arrays

from qcompiler.images import Preprocess
from qcompiler.ir.errors import CalibrationError, OptionError
from qcompiler.samples import Samples

PIL = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


def picture(path, height, width):
    ramp = np.linspace(0, 255, height * width).reshape(height, width, 1)
    pixels = np.concatenate([ramp, 255 - ramp, ramp / 2], -1).astype(np.uint8)
    PIL.fromarray(pixels).save(path)
    return pixels.astype(np.float32)


def test_images(tmp_path):
    (tmp_path / "cats").mkdir()
    pixels = picture(tmp_path / "cats" / "a.png", 6, 8)
    model = [Input("image", ["n", 3, 6, 8])]
    (sample,) = arrays(tmp_path, model, Preprocess.parse("size=6x8, mean=0.5/0.4/0.3, std=0.2"))
    expected = (pixels / 255 - np.array([0.5, 0.4, 0.3])) / 0.2
    np.testing.assert_allclose(
        sample["image"][0], expected.transpose(2, 0, 1), rtol=1e-5, atol=1e-5
    )
    (sample,) = arrays(
        tmp_path, [Input("i", [1, 4, 4, 3])],
        Preprocess.parse("size=4,resize=6,scale=1,order=bgr,layout=nhwc"),
    )  # fmt: skip
    np.testing.assert_array_equal(sample["i"][0], pixels[1:5, 2:6, ::-1])
    (sample,) = arrays(tmp_path, [Input("i", [1, 1, 3, 5])], Preprocess((3, 5), order="gray"))
    assert 0 < sample["i"].mean() < 1


def test_of_an_image_that_moves_the_first_picture_is_taken(tmp_path):
    frames = [PIL.new("P", (8, 8), color) for color in (7, 200)]
    for frame in frames:
        frame.putpalette([value for gray in range(256) for value in (gray, gray, gray)])
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    model = [Input("i", [1, 1, 8, 8])]
    (sample,) = arrays(tmp_path, model, Preprocess((8, 8), order="gray", scale=1.0))
    np.testing.assert_array_equal(sample["i"], np.full((1, 1, 8, 8), 7))


def test_images_of_the_type_that_a_model_takes(tmp_path):
    pixels = picture(tmp_path / "a.png", 6, 8)
    bytes_in = [Input("i", [1, 6, 8, 3], "tensor(uint8)")]
    (sample,) = arrays(tmp_path, bytes_in, Preprocess.parse("size=6x8,layout=nhwc,dtype=uint8"))
    assert sample["i"].dtype == np.uint8
    np.testing.assert_array_equal(sample["i"][0], pixels)
    half = [Input("i", [1, 3, 6, 8], "tensor(float16)")]
    (sample,) = arrays(tmp_path, half, Preprocess((6, 8), dtype="float16"))
    assert sample["i"].dtype == np.float16
    np.testing.assert_allclose(sample["i"][0], pixels.transpose(2, 0, 1) / 255, atol=1e-3)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([Input("i", [1, 3, 6, 8], "tensor(uint8)")], "takes uint8; give --preprocess dtype=uint8"),
        ([Input("i", [1, 6, 8, 3])], "order=gray or layout=nhwc in --preprocess"),
        ([Input("i", [4, 3, 6, 8])], "each image is a batch of 1"),
        ([Input("i", [1, 3, 6, 8]), *TWO], "no array for input 'x'; images are for models of one"),
    ],
)
def test_images_that_do_not_fit(tmp_path, inputs, message):
    picture(tmp_path / "a.png", 6, 8)
    with pytest.raises(CalibrationError, match=message):
        arrays(tmp_path, inputs, Preprocess((6, 8)))


def test_images_of_16_bits_and_turned_ones(tmp_path):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    PIL.fromarray(ramp).save(tmp_path / "a.png")
    (sample,) = arrays(tmp_path, [Input("x", [1, 1, 8, 8])], Preprocess((8, 8), order="gray"))
    np.testing.assert_allclose(sample["x"][0, 0], ramp / 65535, atol=1 / 255)
    (tmp_path / "a.png").unlink()
    turned = PIL.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8)).convert("RGB")
    exif = PIL.Exif()
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "b.png", exif=exif)
    (sample,) = arrays(tmp_path, [Input("x", [1, 1, 6, 8])], Preprocess((6, 8), order="gray"))
    assert sample["x"][0, 0, 0, 0] > sample["x"][0, 0, -1, -1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (20.5, 20)}, "two whole numbers"),
        ({"size": 20}, "two whole numbers"),
        ({"size": (20, 20), "layout": "NCHW"}, "layout=NCHW: one of nchw, nhwc"),
        ({"size": (20, 20), "order": "grey"}, "order=grey: one of rgb, bgr, gray"),
        ({"size": (20, 20), "mean": 0.5}, "mean=0.5: a tuple of numbers"),
        ({"size": (1 << 20, 20)}, "taken for mistakes"),
    ],
)
def test_bad_preprocessing_in_python(options, message):
    with pytest.raises(OptionError, match=message):
        Preprocess(**options)


def test_images_that_do_not_decode(tmp_path):
    picture(tmp_path / "0.png", 4, 4)
    (tmp_path / "1.jpg").write_bytes(b"\xff\xd8\xff nothing")
    message = r"1.jpg \(sample 2 of 2\) is an image that does not decode"
    with pytest.raises(CalibrationError, match=message):
        arrays(tmp_path, [Input("x", [1, 3, 4, 4])], Preprocess((4, 4)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size=8,size=9", "size is given twice"),
        ("224", "'224' is not KEY=VALUE; the keys are size, resize"),
        ("sise=224", "'sise=224' has no key 'sise'; did you mean 'size'"),
        ("size", "'size' is not KEY=VALUE$"),
        ("mean=0.5", "'mean=0.5' does not say size="),
        ("size=2x3x4", "HEIGHTxWIDTH, or one number for both"),
        ("size=big", "invalid literal"),
        ("size=0", "size=0x0, resize=None: sizes are from 1"),
        ("size=8,resize=4", "size=8x8, resize=4: .* resize not below size"),
        ("size=8,mean=1/2", "mean=1/2: give 1 or 3 values"),
        ("size=8,std=0", "must not be 0"),
        ("size=8,dtype=int8", "one of float32, float16, uint8"),
        ("size=8,dtype=uint8,mean=0.5", "gets 0 to 255; leave out scale, mean and std"),
        ("size=8,order=gbr", "one of rgb, bgr, gray"),
        ("size=8,order=gray,mean=1/2/3", "give 1 or 1 values"),
    ],
)
def test_bad_preprocessing(text, message):
    with pytest.raises(OptionError, match=message):
        Preprocess.parse(text)


def test_images_need_preprocessing_and_arrays_do_not(tmp_path):
    picture(tmp_path / "a.png", 4, 4)
    with pytest.raises(OptionError, match="holds images: say with --preprocess size=224"):
        Samples(tmp_path)
    np.save(tmp_path / "a.npy", X)
    with pytest.raises(CalibrationError, match=r"holds .npy files and images: give a folder"):
        Samples(tmp_path)
    with pytest.raises(OptionError, match="holds no images: leave out --preprocess"):
        Samples(tmp_path / "a.npy", Preprocess((4, 4)))
