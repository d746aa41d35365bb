import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from golden import model_of

from qcompiler.bench import bench
from qcompiler.cores import available_cores, busy_cores
from qcompiler.ir.errors import (
    BundleError,
    CalibrationError,
    ModelError,
    OptionError,
    QCompilerError,
    said_by_ort,
)
from qcompiler.random_inputs import random_feed
from qcompiler.runtime import open_model
from qcompiler.vocabularies import vocabularies_of_file


@dataclasses.dataclass
class Input:
    """What `session.get_inputs()` gives."""

    name: str
    type: str
    shape: list


IDS = Input("input_ids", "tensor(int64)", ["batch", "seq"])
MASK = Input("attention_mask", "tensor(int64)", ["batch", "seq"])
IMAGE = Input("image", "tensor(float)", ["batch", 3, None, None])


def save(path: Path, body: str) -> Path:
    onnx.save(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]>\n{body}'), path)
    return path


@pytest.fixture
def model(tmp_path) -> Path:
    return save(tmp_path / "a.onnx", "g (float[n, 4] x) => (float[n, 4] y) { y = Relu (x) }")


def test_defaults_fill_dynamic_dimensions_and_say_so():
    feed, fed = random_feed([IDS, MASK, IMAGE], {})
    assert feed["input_ids"].shape == (1, 128)
    assert feed["image"].shape == (1, 3, 224, 224)
    assert fed[0].assumed == {"batch": 1, "seq": 128}
    assert fed[1].assumed == {}
    assert fed[2].assumed == {"image[2]": 224, "image[3]": 224}


def test_inputs_too_large_to_make_up_are_refused():
    video = Input("video", "tensor(float)", ["b", "c", "t", "h", "w", 64])
    with pytest.raises(OptionError, match="'video' of 1x128x128x128x128x64 is too large .*its sh"):
        random_feed([video], {})
    message = "'image' of 9999x3x99x99 .* make up, above 67,108,864 values: give a smaller one"
    with pytest.raises(OptionError, match=message):
        random_feed([IMAGE], {"image": (9999, 3, 99, 99)})


def test_too_little_memory_is_said_as_that(tmp_path):
    outer = "g (float[n, 1] x) => (float[n, n] y) { t = Transpose (x) y = MatMul (x, t) }"
    path = save(tmp_path / "outer.onnx", outer)
    message = "may not suit the model: give --data DIR; .*: out of memory: node .* asks for [0-9,]+"
    with pytest.raises(ModelError, match=f"{message} MiB more; give smaller inputs$") as caught:
        bench(path, path, threads=[1], seconds=0.01, shapes={"x": (1 << 24, 1)})
    assert "onnxruntime_src" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Add node. "
            "Name:'add' Status Message: /src/bfc_arena.cc:360 void* A::B(size_t, bool, C*) Failed "
            "to allocate memory for requested buffer of size 640000000\n",
            "out of memory: node 'add' asks for 610 MiB more; give smaller inputs",
        ),
        ("std::bad_alloc", "out of memory; give smaller inputs"),
        (
            "FAIL : /src/core/model.cc:340 M::Model(onnx::ModelProto&&, const L::Logger&) Local "
            "functions must\nnot be recursive",
            "FAIL : Local functions must not be recursive",
        ),
        ("", "RuntimeError"),
    ],
)
def test_what_onnxruntime_says_in_one_line(said, told):
    assert said_by_ort(RuntimeError(said)) == told


PAST = Input("past_key_values.0.key", "tensor(float)", ["batch", 3, "past", 64])
SUM = Input("attention_mask", "tensor(int64)", ["batch", "past + seq"])


def test_the_past_is_empty_and_sums_add_up():
    feed, fed = random_feed([IDS, SUM, PAST], {})
    assert feed["past_key_values.0.key"].shape == (1, 3, 0, 64)
    assert feed["attention_mask"].shape == (1, 128)
    assert [shape.assumed for shape in fed] == [{"batch": 1, "seq": 128}, {}, {"past": 0}]
    feed, _ = random_feed([IDS, SUM, PAST], {"input_ids": (2, 1), PAST.name: (2, 3, 7, 64)})
    assert feed["attention_mask"].shape == (2, 8)


def test_a_given_shape_sizes_the_other_inputs():
    feed, fed = random_feed([IDS, MASK], {"attention_mask": (2, 16)})
    assert feed["input_ids"].shape == (2, 16)
    assert fed[0].assumed == {}


@pytest.mark.parametrize(
    ("expected", "values"),
    [
        (Input("attention_mask", "tensor(int64)", [1, 3]), [[1, 1, 1]]),
        (Input("mask", "tensor(float)", [1, 3]), [[1, 1, 1]]),
        (Input("flag", "tensor(bool)", [2]), [True, True]),
        (Input("token_type_ids", "tensor(int32)", [1, 3]), [[0, 0, 0]]),
        (Input("position_ids", "tensor(int64)", [2, 3]), [[0, 1, 2], [0, 1, 2]]),
    ],
)
def test_values_follow_names(expected, values):
    feed, _ = random_feed([expected], {})
    array = feed[expected.name]
    np.testing.assert_array_equal(array, values)
    assert str(array.dtype) in expected.type.replace("float", "float32")


@pytest.mark.parametrize("kind", ["float", "float16", "double", "int64", "int32", "uint8"])
def test_random_values_have_the_type(kind):
    feed, fed = random_feed([Input("x", f"tensor({kind})", [64])], {})
    assert fed[0].dtype == {"float": "float32", "double": "float64"}.get(kind, kind)
    assert len(np.unique(feed["x"])) > 8
    again, _ = random_feed([Input("x", f"tensor({kind})", [64])], {})
    np.testing.assert_array_equal(feed["x"], again["x"])
    if kind[0] in "iu":
        assert feed["x"].min() >= 0
        assert feed["x"].max() < 100


@pytest.mark.parametrize(
    ("inputs", "shapes", "message"),
    [
        ([IDS], {"input_id": (1, 2)}, "no input 'input_id'; did you mean 'input_ids'?"),
        ([IDS], {"zzz": (1, 2)}, "no input 'zzz'; the inputs are input_ids"),
        ([IDS], {"input_ids": (1, 2, 3)}, "input_ids=1x2x3 does not fit, the model takes"),
        ([IMAGE], {"image": (1, 4, 8, 8)}, "image=1x4x8x8 does not fit"),
        ([Input("s", "tensor(string)", [1])], {}, "cannot make up values for input 's'"),
    ],
)
def test_inputs_that_cannot_be_made_up(inputs, shapes, message):
    with pytest.raises(OptionError) as caught:
        random_feed(inputs, shapes)
    assert message in str(caught.value)


def test_bench_times_both_sides(model):
    told = []
    found = bench(model, model, threads=[1, 1, 2], seconds=0.05,
                  progress=lambda *step: told.append(step))  # fmt: skip
    assert [result.threads for result in found.results] == [1, 2]
    for result in found.results:
        assert result.rounds >= 5
        assert 0 < result.model.minimum <= result.model.median
        assert result.spread[0] <= result.spread[1]
        assert result.speedup == result.model.median / result.bundle.median
    assert found.inputs[0].assumed == {"n": 1}
    assert told[-1] == ("2 threads", 100, 100)
    assert [step[1] for step in told] == sorted(step[1] for step in told)
    assert json.loads(json.dumps(found.to_dict()))["results"][0]["threads"] == 1


def test_bench_feeds_samples(model, tmp_path):
    for index in range(3):
        np.savez(tmp_path / f"{index}.npz", x=np.ones((2, 4), np.float32))
    found = bench(model, model, threads=[1], data=tmp_path, seconds=0.01)
    assert found.samples == 3
    assert found.inputs[0].shape == (2, 4)
    assert found.inputs[0].values == "sample"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seconds": 0}, OptionError, "seconds must be above 0"),
        ({"seconds": float("nan")}, OptionError, "seconds must be above 0"),
        ({"seconds": float("inf")}, OptionError, "and finite, not inf"),
        ({"threads": [0]}, OptionError, "threads must be a whole number from 1"),
        ({"shapes": {"y": (1,)}}, OptionError, "no input 'y'"),
        ({"data": "nowhere"}, CalibrationError, "nowhere does not exist"),
        ({"data": ".", "shapes": {"x": (1, 4)}}, OptionError, "not both"),
    ],
)
def test_bad_options(model, options, error, message):
    with pytest.raises(error, match=message):
        bench(model, model, **{"threads": [1], "seconds": 0.01} | options)


def test_models_that_do_not_belong_together(model, tmp_path):
    other = save(tmp_path / "b.onnx", "g (float[n] z) => (float[n] y) { y = Relu (z) }")
    with pytest.raises(OptionError, match="not the same model"):
        bench(other, model, threads=[1], seconds=0.01)


def test_a_model_that_fails_on_its_inputs(tmp_path):
    path = save(
        tmp_path / "c.onnx",
        "g (float[n, m] x, float[k, n] w) => (float[a, b] y) { y = MatMul (x, w) }",
    )
    with pytest.raises(ModelError, match="fails on these inputs"):
        bench(path, path, threads=[1], shapes={"x": (2, 3), "w": (5, 7)}, seconds=0.01)


def test_a_model_that_fails_on_made_up_inputs(tmp_path):
    path = save(
        tmp_path / "c.onnx",
        "g (float[n, m] x, float[k, n] w) => (float[a, b] y) { y = MatMul (x, w) }",
    )
    with pytest.raises(ModelError) as caught:
        bench(path, path, threads=[1], shapes={"x": (2, 3)}, seconds=0.01)
    assert "made up, assuming k=1, and may not suit the model" in str(caught.value)
    assert "give --shapes NAME=1x128,… or --data DIR" in str(caught.value)
    np.savez(tmp_path / "0.npz", x=np.ones((2, 3), np.float32), w=np.ones((5, 7), np.float32))
    with pytest.raises(ModelError) as caught:
        bench(path, path, threads=[1], data=tmp_path / "0.npz", seconds=0.01)
    assert "made up" not in str(caught.value)


def test_the_last_word_is_100_percent(model, monkeypatch):
    # A round asks for the time five times, so the last one begins 21 seconds after the start.
    monkeypatch.setattr("qcompiler.bench.time.perf_counter", itertools.count().__next__)
    told = []
    bench(model, model, threads=[1], seconds=22, progress=lambda *step: told.append(step[1]))
    assert told[-2:] == [95, 100]


STAT = """cpu  9 9 9 9
cpu0 {} 0 0 {} 0 0 0 0 50 0
cpu1 0 0 0 {} {} 0 0 0 0 0
intr 5
"""


def test_busy_cores_are_counted(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    monkeypatch.setattr("qcompiler.cores._STAT", stat)
    monkeypatch.setattr("qcompiler.cores._ours", lambda: {0, 1})
    monkeypatch.setattr(
        "qcompiler.cores.time.sleep", lambda _: stat.write_text(STAT.format(175, 25, 60, 40))
    )
    stat.write_text(STAT.format(100, 0, 0, 0))
    assert busy_cores() == 0.75
    assert available_cores() == 2
    monkeypatch.setattr("qcompiler.cores.time.sleep", lambda _: stat.unlink(missing_ok=True))
    assert busy_cores() is None
    assert busy_cores() is None


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [("nowhere", ModelError, "does not exist"), (".", BundleError, "not a bundle")],
)
def test_nothing_to_open(path, error, message):
    with pytest.raises(error, match=message):
        open_model(Path(path))


def test_open_a_bundle_by_its_manifest(digits):
    session = open_model(digits.bundle / "manifest.json")
    assert session.get_inputs()[0].name == "image"


def test_every_error_is_one_of_ours(tmp_path):
    path = tmp_path / "garbage.onnx"
    path.write_bytes(b"garbage")
    with pytest.raises(QCompilerError, match="cannot load .*: it is no ONNX model, or damaged"):
        open_model(path)


IDS_OF_FEW = """
g (int64[n,t] ids, int64[t] roles) => (float[a,b,c] y, float[d,e] z)
{ table = DequantizeLinear (stored, scale) wide = Cast <to = 7> (ids) y = Gather (table, wide)
  again = Unsqueeze (roles, first) flat = Squeeze (again, first) z = Gather (few, flat) }
"""


def test_indices_made_up_are_rows_of_the_models_tables(tmp_path):
    tables = {
        "stored": np.ones((7, 4), np.int8), "scale": np.float32(0.5),
        "few": np.ones((3, 4), np.float32), "first": np.zeros(1, np.int64),
    }  # fmt: skip
    path = tmp_path / "few.onnx"
    ir.save(model_of(IDS_OF_FEW, tables), path)
    assert vocabularies_of_file(path) == {"ids": 7, "roles": 3}
    assert bench(path, path, threads=[1], seconds=0.01).results
    assert vocabularies_of_file(tmp_path / "none.onnx") == {}
