"""What looks on between passes: prints, dumps, and the numbers before and after each."""

import re

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from conftest import mlp
from golden import model_of, run
from pipelines import FEEDS, RULE, Break, Halve, halving

from qcompiler.ir.errors import CalibrationError, NumericsError, OptionError
from qcompiler.ir.stages import Stage
from qcompiler.numerics import CheckNumerics
from qcompiler.pipeline import Pipeline, Step
from qcompiler.samples import Samples
from qcompiler.step import Watcher, as_pass
from qcompiler.watch import DumpModels, PrintAfter, check_dumps


class Note(Watcher):
    """Remembers what it is told."""

    def __init__(self):
        self.told = []

    def start(self, steps, model):
        self.told.append(("start", len(steps)))

    def before(self, step, model):
        self.told.append((step.name, len(model.graph)))

    def after(self, step, model, changed):
        self.told.append((step.name, len(model.graph), changed))


def test_watchers_see_the_model_before_and_after():
    model = model_of("g (float[2] x) => (float[2] y) { a = Neg (x) b = Neg (a) y = Relu (b) }")
    note = Note()
    pipeline = Pipeline([Step("negations", as_pass([RULE]), Stage.FLOAT)])
    pipeline.run(model, watchers=[Watcher(), note])
    assert note.told == [("start", 1), ("negations", 3), ("negations", 2, True)]


def test_print_after():
    texts = []
    Pipeline.default("arm-int8").run(
        mlp(), watchers=[PrintAfter(["fuse-gelu", "fold-qdq"], texts.append)]
    )
    assert texts[0].startswith("# after fuse-gelu, which changed nothing\n")
    assert "QMatMulW8A8" in texts[1]
    assert len(texts) == 2
    with pytest.raises(
        OptionError, match="print after 'fold-qdg': no such pass runs; did you mean"
    ):
        Pipeline.default("arm-int8").run(mlp(), watchers=[PrintAfter(["fold-qdg"], print)])


def test_dumps_run_and_share_their_weights(tmp_path):
    expected = run(mlp(), FEEDS)[0]
    pipeline = Pipeline.default("arm-int8")
    for _ in range(2):  # the second run replaces the files of the first
        pipeline.run(mlp(), watchers=[DumpModels(tmp_path / "dumps")])
    files = sorted(file.name for file in (tmp_path / "dumps").iterdir())
    assert files[:2] == ["00-source.onnx", "01-canonicalize.onnx"]
    assert files[-3:] == [
        f"{len(pipeline.steps)}-bind-kernels.onnx", "qcompiler-dump.txt", "weights.data",
    ]  # fmt: skip
    for name in files[:-2]:
        session = ort.InferenceSession(tmp_path / "dumps" / name)
        assert np.abs(session.run(None, FEEDS)[0] - expected).max() < 0.05 * np.abs(expected).max()
    floats = sum(value.const_value.nbytes for value in mlp().graph.initializers.values())
    assert (tmp_path / "dumps" / "weights.data").stat().st_size < 1.5 * floats


def test_dumps_do_not_replace_other_files(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(OptionError, match=r"for dumps holds other files \(thesis.txt\); name"):
        Pipeline.default("arm-int8").run(mlp(), watchers=[DumpModels(tmp_path)])
    with pytest.raises(OptionError, match="cannot write to .*thesis.txt"):
        Pipeline.default("arm-int8").run(mlp(), watchers=[DumpModels(tmp_path / "thesis.txt")])


def test_dumps_keep_away_from_the_model(tmp_path):
    for name in ("00-mine.onnx", "weights.data"):  # named like dumps, which they are not
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(OptionError, match=f"holds other files .{name}"):
            Pipeline([]).run(mlp(), watchers=[DumpModels(folder)])
        assert (folder / name).read_text() == "mine"
    Pipeline([]).run(mlp(), watchers=[DumpModels(tmp_path / "dumps")])
    source = tmp_path / "dumps" / "00-source.onnx"
    before = source.read_bytes()
    with pytest.raises(OptionError, match="for dumps and the weights .*lie in one another; name"):
        Pipeline([]).run(ir.load(source), watchers=[DumpModels(tmp_path / "dumps")])
    for file, output, what in ((source, tmp_path / "out", "model"),
                               (tmp_path / "m.onnx", tmp_path / "dumps" / "out", "output"),
                               (tmp_path / "m.onnx", tmp_path, "output")):  # fmt: skip
        with pytest.raises(OptionError, match=f"for dumps and the {what} .* lie in one another"):
            check_dumps([DumpModels(tmp_path / "dumps")], file, output)
    assert source.read_bytes() == before


# Numerics


@pytest.fixture
def samples(tmp_path):
    file = tmp_path / "samples.npz"
    np.savez(file, **FEEDS)
    return file


def test_numerics_of_the_default_passes(samples):
    numerics = CheckNumerics(samples)
    Pipeline.default("arm-int8").run(mlp(), watchers=[numerics])
    changes = {change.step: change for change in numerics.changes}
    assert [step for step, change in changes.items() if change.rounds] == [
        "widen-floats", "round-tables", "awq", "hqq", "gptq", "insert-qdq", "round-to-nearest",
        "convert-float16",
    ]  # fmt: skip
    assert not changes["convert-float16"].changed
    assert not changes["fuse-gelu"].changed
    assert changes["assign-precision"].sqnr is None
    assert 30 < changes["insert-qdq"].sqnr < 60
    assert changes["insert-qdq"].max_error > 0
    assert changes["fold-qdq"].sqnr is None or changes["fold-qdq"].sqnr > 60
    assert 30 < changes["bind-kernels"].sqnr_since_source < 60


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (
            {},
            r"^halve changes output 'y' to \d+\.\d dB, less than 60, by at most .* --numerics-bou",
        ),
        (
            {"bound": 0.0, "rounding_bound": 70.0},
            "^insert-qdq changes .*than 70.*set --rounding-bo",
        ),
    ],
)
def test_a_jump_names_its_pass(samples, bounds, message):
    with pytest.raises(NumericsError, match=message):
        halving().run(mlp(), watchers=[CheckNumerics(samples, **bounds)])


def test_a_quantized_model_may_decide_ties_otherwise(samples):
    pipeline = Pipeline.default("arm-int8").select("canonicalize..round-to-nearest")
    quantized = pipeline.run(mlp())
    numerics = CheckNumerics(samples)
    scaled = Step("scale", Halve(Halve.Options(factor=1.02)), Stage.QDQ)
    Pipeline([scaled]).run(quantized, watchers=[numerics])
    assert 15 < numerics.changes[0].sqnr < 60


def test_so_may_one_all_of_whose_products_quantize_their_input(samples):
    """The only QuantizeLinear are in the functions of regions."""
    passes = "canonicalize..merge-siblings,fuse-quantize"
    model = Pipeline.default("x86-int8").select(passes).run(mlp())
    assert not any(node.op_type.startswith("Quantize") for node in model.graph)
    numerics = CheckNumerics(samples)
    scaled = Step("scale", Halve(Halve.Options(factor=1.02)), Stage.KERNEL)
    Pipeline([scaled]).run(model, watchers=[numerics])
    assert 15 < numerics.changes[0].sqnr < 60


def rename(graph):
    graph.outputs[0].name = "z"


def infinite(graph):
    graph.initializers["d"].const_value = ir.tensor(np.full(64, np.inf, np.float32), name="d")


def narrow(graph, axis=1):
    axes = ir.Value(name="axes", const_value=ir.tensor(np.array([axis]), name="axes"))
    graph.register_initializer(axes)
    total = ir.node("ReduceSum", [graph.outputs[0], axes], name="total")
    total.outputs[0].name = "total"
    graph.append(total)
    old, graph.outputs[0] = graph.outputs[0], total.outputs[0]
    old.name, total.outputs[0].name = "inner", "y"


def leave_the_axes(graph):
    narrow(graph, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, r"break renames outputs: \['y'\] become \['z'\]"),
        (leave_the_axes, "after break the model runs no more: ONNX Runtime cannot load"),
        (infinite, "break makes 320 values of output 'y' NaN or Inf"),
        (narrow, r"break changes the shape of output 'y' from \[5, 64\] to \[5, 1\]"),
    ],
)
def test_a_pass_that_breaks_the_model_is_named(samples, change, message):
    pipeline = Pipeline([Step("break", Break(change), Stage.FLOAT)])
    with pytest.raises(NumericsError, match=message):
        pipeline.run(mlp(), watchers=[CheckNumerics(samples)])


def test_samples_and_bounds_are_checked(tmp_path):
    with pytest.raises(CalibrationError, match="no samples: .*nowhere does not exist"):
        CheckNumerics(tmp_path / "nowhere")
    np.savez(tmp_path / "s.npz", z=np.zeros(3))
    with pytest.raises(OptionError, match=re.escape("a bound is a number of dB, not nan")):
        CheckNumerics(tmp_path / "s.npz", bound=float("nan"))
    with pytest.raises(CalibrationError, match="s.npz .* has no array for input 'x', only"):
        Pipeline([]).run(mlp(), watchers=[CheckNumerics(tmp_path / "s.npz")])


def nothing():
    return []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (nothing, "nothing.* no samples|no samples.*nothing"),
        (lambda: [FEEDS["x"][:0]], "checks no numerics: all outputs on it are empty"),
    ],
)
def test_numerics_need_something_to_compare(source, message):
    with pytest.raises(CalibrationError, match=message):
        Pipeline([]).run(mlp(), watchers=[CheckNumerics(Samples(source))])


def test_a_jump_of_a_quantized_model_mentions_ties(samples):
    quantized = Pipeline.default("arm-int8").select("..round-to-nearest").run(mlp())
    scaled = Step("scale", Halve(Halve.Options(factor=1.5)), Stage.QDQ)
    with pytest.raises(NumericsError, match=r"if that may be .ties between two steps may cost"):
        Pipeline([scaled]).run(quantized, watchers=[CheckNumerics(samples)])
