"""Exported programs, and modules with inputs: the same numbers, dynamic shapes kept."""

import sys

import numpy as np
import onnx_ir as ir
import pytest
from golden import sqnr

import qcompiler
from qcompiler.frontend import load_model
from qcompiler.ir.errors import ModelError, OptionError

torch = pytest.importorskip("torch", reason="torch is not installed")

BATCH = torch.export.Dim("batch")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(
            torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.LayerNorm(128)
        )
        self.head = torch.nn.Linear(128, 10)

    def forward(self, x, bias):
        return self.head(self.body(x)) + bias


EXAMPLE = (torch.zeros(2, 64), torch.zeros(10))


@pytest.fixture(scope="module")
def module():
    return Net().eval()


@pytest.fixture(scope="module")
def program(module):
    return torch.export.export(module, EXAMPLE, dynamic_shapes=({0: BATCH}, None))


def agrees(session, module):
    """Whether a session answers as the module does, at other sizes than those of the example."""
    names = [value.name for value in session.get_inputs()]
    assert names == ["x", "bias"]
    for rows in (1, 5):
        rng = np.random.default_rng(rows)
        feeds = {
            "x": rng.standard_normal((rows, 64), dtype=np.float32),
            "bias": rng.standard_normal(10, dtype=np.float32),
        }
        with torch.no_grad():
            expected = module(*map(torch.from_numpy, feeds.values())).numpy()
        assert sqnr(expected, session.run(None, feeds)[0]) > 15


@pytest.mark.parametrize("target", ["arm-int8", "cuda-int4"])
def test_compiles_an_exported_program(program, module, target, tmp_path):
    report = qcompiler.compile(program, target, tmp_path / "b")
    assert report.count("body") + report.count("kernel") >= 2
    agrees(qcompiler.load(report.bundle, native=False), module)


@pytest.mark.parametrize(
    ("inputs", "shapes"),
    [
        (EXAMPLE, ({0: BATCH}, None)),
        ({"bias": EXAMPLE[1], "x": EXAMPLE[0]}, {"bias": None, "x": {0: BATCH}}),
    ],
    ids=["positional", "keywords"],
)
def test_compiles_a_graph_module_with_example_inputs(module, inputs, shapes, tmp_path):
    traced = torch.fx.symbolic_trace(module)
    report = qcompiler.compile(
        traced, "arm-int8", tmp_path / "b", example_inputs=inputs, dynamic_shapes=shapes
    )
    agrees(qcompiler.load(report.bundle), module)


def test_any_module_in_eval_mode_is_traced(module):
    model = load_model(module, EXAMPLE, ({0: torch.export.Dim.AUTO}, None))
    assert [isinstance(value.shape[0], ir.SymbolicDim) for value in model.graph.inputs] == [
        True,
        False,
    ]


def test_a_module_without_example_inputs(module):
    with pytest.raises(OptionError, match="a Net needs example_inputs, a tuple of its arguments"):
        load_model(module)


def test_example_inputs_that_are_no_tuple(module):
    with pytest.raises(OptionError, match=r"example_inputs is a Tensor: give a tuple .*\(x,\)"):
        load_model(module, EXAMPLE[0])


def test_example_inputs_for_a_program(program):
    with pytest.raises(OptionError, match="ExportedProgram has inputs and dynamic shapes of its"):
        load_model(program, EXAMPLE)


def test_example_inputs_for_a_file(tmp_path):
    with pytest.raises(OptionError, match="are for a torch module: a saved model has shapes"):
        qcompiler.compile(tmp_path / "m.onnx", "arm-int8", tmp_path / "b", example_inputs=EXAMPLE)


def test_a_module_in_training_mode():
    with pytest.raises(ModelError, match=r"this Net is in training mode; call its eval\(\)"):
        load_model(Net(), EXAMPLE)


class Random(torch.nn.Module):
    def __init__(self, training):
        super().__init__()
        self.always = training

    def forward(self, x):
        return torch.nn.functional.dropout(x, 0.5, training=self.training or self.always)


def test_a_graph_in_training_mode():
    x = torch.ones(3)
    program = torch.export.export(Random(False), (x,))
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Dropout()))
    for source, example in ((program, None), (program.module(), (x,)), (traced, (x,))):
        with pytest.raises(ModelError, match=r"training mode, its .*: export module.eval\(\)"):
            load_model(source, example)
    assert load_model(traced.eval(), (x,))
    # Who draws in eval mode means to.
    assert [node.op_type for node in load_model(Random(True).eval(), (x,)).graph] == ["Dropout"]


def test_inputs_that_the_module_does_not_take(module):
    with pytest.raises(ModelError, match=r"torch.export cannot trace this Net: .*draft_export"):
        load_model(module, (torch.zeros(2, 64),))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_weights_that_are_packed_for_torch():
    linear = torch.nn.Sequential(torch.nn.Linear(4, 4))
    packed = torch.ao.quantization.quantize_dynamic(linear, {torch.nn.Linear})
    with pytest.raises(ModelError, match="holds a Linear of torch.ao.nn.quantized.*, which packs"):
        load_model(packed.eval(), (torch.zeros(2, 4),))


def test_script_is_no_program():
    scripted = torch.jit.trace(torch.nn.ReLU(), (torch.zeros(2),))
    with pytest.raises(ModelError, match="TorchScript holds no program that can be exported"):
        load_model(scripted, (torch.zeros(2),))


def test_an_op_without_onnx_is_named():
    class Unusual(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.eig(x)[0].real

    with pytest.raises(ModelError, match=r"cannot translate \w+ \(torch.ops.aten.linalg_eig"):
        load_model(Unusual().eval(), (torch.eye(3),))


def test_results_that_are_no_tensors_are_named():
    class Pair(torch.nn.Module):
        def forward(self, x):
            return x + 1, None, 3

    with pytest.raises(ModelError, match="result 2 of the program is 3, a constant and no tensor"):
        load_model(Pair().eval(), (torch.eye(3),))


def test_state_that_is_not_kept_is_told(tmp_path):
    class Cache(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(64, 64)
            self.register_buffer("seen", torch.zeros(3, 64))
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x, past):
            past.add_(self.linear(x))
            self.seen += past
            self.count += 1
            return self.seen * 2

    example = (torch.zeros(3, 64), torch.zeros(3, 64))
    report = qcompiler.compile(Cache().eval(), "arm-int8", tmp_path / "b", example_inputs=example)
    (note,) = (note for note in report.notes if "keep nothing between runs" in note)
    assert note.startswith("the module writes to its buffer 'seen', input 'past', and ONNX")


def test_a_value_returned_twice(tmp_path):
    class Twice(torch.nn.Module):
        def forward(self, x):
            y = x.exp()
            return y, y

    report = qcompiler.compile(
        Twice().eval(), "arm-int8", tmp_path / "b", example_inputs=(torch.zeros(3),)
    )
    assert len(qcompiler.load(report.bundle).get_outputs()) == 2


def test_something_else():
    with pytest.raises(ModelError, match="cannot read a list: give a path, an onnx_ir.Model"):
        load_model([1, 2])


def test_without_torch(program, monkeypatch, tmp_path):
    torch.export.save(program, tmp_path / "net.pt2")
    monkeypatch.setitem(sys.modules, "torch", None)
    for source, what in ((program, "a ExportedProgram"), (tmp_path / "net.pt2", r".*net\.pt2")):
        with pytest.raises(ModelError, match=rf"{what}: torch is not installed .*qcompiler.torch"):
            load_model(source)
