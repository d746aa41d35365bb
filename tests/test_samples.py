"""Where samples come from: files, folders, images and functions, and what is wrong with them."""

import re
import sys

import numpy as np
import pytest
from golden import model_of
from onnx import numpy_helper

import qcompiler
from qcompiler.images import Preprocess
from qcompiler.ir.errors import CalibrationError, OptionError
from qcompiler.sample_function import samples_of
from qcompiler.samples import Samples, check_sample

PIL = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

X = np.arange(12, dtype=np.float32).reshape(1, 3, 4)


class Input:
    def __init__(self, name, shape, type="tensor(float)"):
        self.name, self.shape, self.type = name, shape, type


ONE = [Input("x", [1, 3, 4])]
TWO = [*ONE, Input("y", [2], "tensor(int64)")]


def arrays(source, inputs=ONE, preprocess=None):
    samples = Samples(source, preprocess)
    samples.check(inputs)
    return [check_sample(name, sample, inputs) for name, sample in samples]


def test_npy_files_are_the_only_input(tmp_path):
    for index in range(2):
        np.save(tmp_path / f"{index}.npy", X + index)
    first, second = arrays(tmp_path)
    np.testing.assert_array_equal(first["x"], X)
    np.testing.assert_array_equal(second["x"], X + 1)
    (single,) = arrays(tmp_path / "1.npy")
    np.testing.assert_array_equal(single["x"], X + 1)
    with pytest.raises(CalibrationError, match=r"0.npy .* has no array for input 'y', only ..#0"):
        arrays(tmp_path, TWO)


def test_onnx_test_data(tmp_path):
    for number in (0, 1):
        folder = tmp_path / f"test_data_set_{number}"
        folder.mkdir()
        for index, (name, array) in enumerate([("x", X + number), ("", np.array([1, 2]))]):
            tensor = numpy_helper.from_array(array, name)
            (folder / f"input_{index}.pb").write_bytes(tensor.SerializeToString())
        (folder / "output_0.pb").write_bytes(b"not looked at")
    found = arrays(tmp_path, TWO)
    assert [sample["x"][0, 0, 0] for sample in found] == [0, 1]
    np.testing.assert_array_equal(found[0]["y"], [1, 2])
    assert len(arrays(tmp_path / "test_data_set_1", TWO)) == 1
    (tmp_path / "test_data_set_1" / "input_1.pb").write_bytes(b"\xff\xff")
    with pytest.raises(CalibrationError, match=r"_1 .*sample 2 of 2.* ONNX test data: input_1.pb"):
        arrays(tmp_path, TWO)


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


def test_functions(tmp_path, monkeypatch):
    assert len(arrays(lambda: iter([X, X]))) == 2
    assert len(Samples(lambda: iter([X, X]))) == 2
    (sample,) = arrays(lambda: [(X, np.array([1, 2]))], TWO)
    np.testing.assert_array_equal(sample["y"], [1, 2])
    (sample,) = arrays(lambda: [{"y": np.array([3, 4]), "x": X, "label": 1}], TWO)
    np.testing.assert_array_equal(sample["y"], [3, 4])
    (tmp_path / "mine.py").write_text(
        "import numpy\ndef data():\n    yield numpy.ones((1, 3, 4), 'f4')\n"
    )
    monkeypatch.chdir(tmp_path)
    (sample,) = arrays("mine:data")
    np.testing.assert_array_equal(sample["x"], np.ones((1, 3, 4)))


ONCE = iter([X, X])


def fails():
    yield X
    raise KeyError("lost")


def test_lists():
    first, second = arrays([{"x": X}, X + 1])
    np.testing.assert_array_equal(first["x"], X)
    np.testing.assert_array_equal(second["x"], X + 1)
    with pytest.raises(CalibrationError, match=r"sample 2 of the list: input 'x' has shape .3, 4."):
        arrays([X, X[0]])
    with pytest.raises(CalibrationError, match="no samples: the list gives none"):
        arrays([])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"z": X}, r"has no array for input 'x', only ..z..; name it so: .* in Python {'x': …}"),
        ({"x": X.astype("f8")}, "input 'x' is float64, the model takes float32; give array.astype"),
        ({"x": X * np.nan}, "input 'x' holds 12 NaN or Inf; repair the sample, or leave it out"),
    ],
)
def test_what_is_wrong_in_memory_does_not_speak_of_files(bad, message):
    with pytest.raises(CalibrationError, match=f"^sample 2 of the list:? {message}") as caught:
        arrays([{"x": X}, bad])
    assert "the file" not in str(caught.value)


def test_lists_of_paths(tmp_path):
    np.savez(tmp_path / "a.npz", x=X)
    np.save(tmp_path / "b.npy", X + 1)
    first, second, third = arrays([tmp_path / "a.npz", str(tmp_path / "b.npy"), {"x": X + 2}])
    assert [s["x"][0, 0, 0] for s in (first, second, third)] == [0, 1, 2]
    np.savez(tmp_path / "z.npz", z=X)
    (tmp_path / "text.npz").write_text("no zip")
    picture(tmp_path / "i.png", 4, 4)
    for name, message in [
        ("none.npz", r": no samples: .*none.npz does not exist"),
        ("z.npz", r" has no array for input 'x', only ..z"),
        ("text.npz", r" is not an .npz of plain arrays: it holds pickled objects"),
        ("i.png", r" is no .npz or .npy file: a folder, or images, are a source of their own"),
        ("", r" is no .npz or .npy file: a folder"),
    ]:
        with pytest.raises(CalibrationError) as caught:
            arrays([tmp_path / "a.npz", tmp_path / name])
        said = str(caught.value)
        assert said.startswith(f"{tmp_path / name} (sample 2 of the list)")
        assert re.search(message, said), said


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fails, "fails fails: KeyError: 'lost'"),
        (lambda: 3, "returns a int: let it return a list of samples, or yield"),
        (lambda: {"x": X}, "returns a dict: let it return a list"),
        (lambda: "batch.npz", "returns a str: let it return a list"),
        (lambda: [], "no samples: .* gives none"),
        (lambda: ONCE, "gave 2 samples at first and 0 when it was asked again"),
        (lambda: sys.exit(3), "fails: SystemExit: 3"),
        (lambda: "/a/path", "returns a str: let it return a list of samples"),
        (lambda: [{"x": {}}], "sample 1 of .*: 'x' is no array; give a dictionary"),
        (lambda: [(X, X, X)], "has 3 arrays without names, the model takes ..x.."),
        (lambda: [{"z": X}], "sample 1 of .* has no array for input 'x', only ..z"),
    ],
)
def test_bad_functions(function, message):
    with pytest.raises(CalibrationError, match=message):
        arrays(function)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:data", "no_such_module:data: cannot import no_such_module"),
        ("json:data", "json has no function 'data'"),
        ("json:lods", "json has no function 'lods'; did you mean 'loads'?"),
        ("json:__name__", "json has no function '__name__'"),
    ],
)
def test_functions_that_are_not_there(name, message):
    with pytest.raises(OptionError, match=message):
        Samples(name)


@pytest.mark.parametrize("source", [{"x": np.zeros(3)}, np.zeros((99, 9))])
def test_samples_themselves_are_no_source(source):
    with pytest.raises(OptionError, match="samples must be a path, a function or a list") as caught:
        Samples(source)
    assert len(str(caught.value)) < 150


def test_compiling_with_a_function(tmp_path):
    rng = np.random.default_rng(0)
    text = "g (float[n,2,8,8] x) => (float[n,4,6,6] y) { c = Conv (x, w) r = Relu (c) y = Neg (r) }"
    model = model_of(text, {"w": rng.standard_normal((4, 2, 3, 3), dtype=np.float32)})
    images = [rng.standard_normal((1, 2, 8, 8), dtype=np.float32) for _ in range(3)]
    report = qcompiler.compile(model, "arm-int8", tmp_path / "b", calibration=lambda: images)
    assert report.count("qdq") > 0
    assert not report.notes


def test_what_a_function_may_return():
    class Indexed:
        def __getitem__(self, index):
            return [X, 2 * X][index]

    for given in (Indexed(), np.stack([X, 2 * X]), (X, 2 * X), iter([X, 2 * X])):
        found = [sample["#0"] for _, sample in samples_of("f", lambda given=given: given)]
        np.testing.assert_array_equal(found, [X, 2 * X])
