"""Every model of ONNX's own node tests, canonicalized: ONNX Runtime answers as before.

What ONNX Runtime does not run as it comes (types and ops that it has no kernel for, opsets newer
than it) is counted, with its reason, and left out.
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx.backend.test.loader import load_model_tests

import qcompiler
from qcompiler.frontend import load_model
from qcompiler.ir.stages import Stage, verify
from qcompiler.model_file import save_model
from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.session_options import new_session_options

QUANTIZED = {"MatMul", "Gemm", "Conv", "QLinearConv", "QLinearMatMul", "DequantizeLinear"}
"""Ops whose models compiling changes once their weights are constant."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with its inputs."""

    name: str
    model: onnx.ModelProto
    inputs: list[Any]

    def write(self, folder: Path) -> Path:
        path = folder / "model.onnx"
        path.write_bytes(self.model.SerializeToString())
        return path


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overflows that some cases are about
        found = load_model_tests(kind="node")
    return [Case(case.name, case.model, case.data_sets[0][0]) for case in found]


def frozen(case: Case, folder: Path) -> Path:
    """A file of the model in which all inputs but the first are constants."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    for declared, array in zip(list(model.graph.input)[1:], case.inputs[1:], strict=True):
        if not isinstance(array, onnx.TensorProto):
            array = onnx.numpy_helper.from_array(np.asarray(array))
        model.graph.initializer.add().CopyFrom(array)
        model.graph.initializer[-1].name = declared.name
        model.graph.input.remove(declared)
    path = folder / "frozen.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def answers(path: Path, inputs: list[Any]) -> list[Any]:
    """The outputs as arrays; those of types that numpy lacks as a type, a shape and bytes."""
    options = new_session_options()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = ort.InferenceSession(path, options)
    feeds = {i.name: value(array) for i, array in zip(session.get_inputs(), inputs, strict=True)}
    if all(isinstance(feed, ort.OrtValue) for feed in feeds.values()):
        return [plain(result) for result in session.run_with_ort_values(None, feeds)]
    return session.run(None, feeds)  # type: ignore[no-any-return]


def value(array: Any) -> Any:
    """What ONNX Runtime takes: an OrtValue of a tensor, else (texts, sequences) what it is."""
    if isinstance(array, onnx.TensorProto):
        array = onnx.numpy_helper.to_array(array)
    if not isinstance(array, np.ndarray | np.generic) or array.dtype.kind in "OSU":
        return array
    array = np.asarray(array)
    if array.dtype.isbuiltin == 1:
        return ort.OrtValue.ortvalue_from_numpy(array)
    kind = ir.DataType.from_numpy(array.dtype)
    if kind.bitwidth < 8:
        raise TypeError(f"ONNX Runtime's Python takes no {kind.name}")
    bits = np.uint16 if array.itemsize == 2 else np.uint8
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(bits), kind)


def plain(result: ort.OrtValue) -> Any:
    try:
        return result.numpy() if result.is_tensor() else result.to_list()
    except (RuntimeError, AttributeError):
        bits = ir.DataType(result.element_type()).bitwidth
        size = -(-int(np.prod(result.shape())) * bits // 8)
        return result.element_type(), result.shape(), ctypes.string_at(result.data_ptr(), size)


def same(first: Any, second: Any) -> bool:
    """Equal to the last bit; any NaN is like another."""
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if not isinstance(first, np.ndarray):
        return bool(first == second)
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return np.array_equal(first, second, equal_nan=first.dtype.kind in "fc")


def reason(error: Exception) -> str:
    """ONNX Runtime's first line, without error codes, and paths, numbers and names that vary."""
    line = str(error).partition("\n")[0].rpartition("failed:")[2].rpartition(" : ")[2]
    return re.sub(r"'[^']*'|\(.*?\)|\d+|/\S+", "_", line)[:100]


def test_every_model_answers_as_before(cases, tmp_path):
    reasons: collections.Counter[str] = collections.Counter()
    ran, failures = 0, []
    for case in cases:
        path = case.write(tmp_path)
        try:
            expected = answers(path, case.inputs)
        except Exception as error:  # each of ONNX Runtime's failures has a type of its own
            reasons[reason(error)] += 1
            continue
        try:
            model = Canonicalize()(load_model(path)).model
            verify(model, Stage.FLOAT, after="canonicalize")
            save_model(model, tmp_path / "canonical.onnx")
            results = answers(tmp_path / "canonical.onnx", case.inputs)
        except Exception as error:
            failures.append(f"{case.name}: {error}")
            continue
        if same(expected, results):
            ran += 1
        elif same(expected, answers(path, case.inputs)):
            failures.append(f"{case.name}: {expected} became {results}")
        else:
            reasons["(its results are random)"] += 1
    print(f"{ran} of {len(cases)} models ran; of the others ONNX Runtime says:")
    print("\n".join(f"{count:5} {reason}" for reason, count in reasons.most_common()))
    assert not failures, "\n".join(failures)
    assert ran > 1300


def test_with_constant_weights_every_model_compiles(cases, tmp_path):
    """Inputs but the first become weights, so that what can be quantized is; answers stay near."""
    compiled = 0
    for case in cases:
        if QUANTIZED.isdisjoint(node.op_type for node in case.model.graph.node):
            continue
        path = frozen(case, tmp_path)
        samples = None
        if any(node.op_type == "Conv" for node in case.model.graph.node):
            name = case.model.graph.input[0].name
            samples = lambda: [{name: case.inputs[0]}]  # noqa: B023, E731 - read at once
        try:
            report = qcompiler.compile(path, "arm-int8", tmp_path / "bundle", calibration=samples)
        except qcompiler.QCompilerError:
            with pytest.raises(Exception, match="."):  # ONNX Runtime takes it no more than we do
                answers(path, case.inputs[:1])
            continue
        qcompiler.load(report.bundle, native=False)
        compiled += 1
    assert compiled > 80
