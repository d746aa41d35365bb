"""Bundles as they live: several at once, stale, without their library, in other folders."""

import os
import platform
import shutil
import subprocess
import sys
import threading

import numpy as np
import onnxruntime as ort
import pytest
from conftest import DIGITS
from golden import model_of, sqnr
from instruction_sets import needs_kernels
from mlp_bundles import X, compiled, library_of, without_bodies

import qcompiler
from qcompiler.targets.catalog import TARGETS

pytestmark = needs_kernels
RNG = np.random.default_rng(1)


def test_native_and_bodies_agree(tmp_path):
    bundle = compiled(tmp_path / "b")
    native = qcompiler.load(bundle).run(None, X)[0]
    bodies = qcompiler.load(bundle, native=False).run(None, X)[0]
    assert sqnr(bodies, native) > 60
    assert not np.array_equal(bodies, native)  # they are not the same thing twice


def test_three_plain_lines(tmp_path):
    bundle = compiled(tmp_path / "b")
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library_of(bundle)))
    session = ort.InferenceSession(bundle / "model.onnx", options)
    np.testing.assert_array_equal(session.run(None, X)[0], qcompiler.load(bundle).run(None, X)[0])


def test_without_its_library(tmp_path):
    bundle = compiled(tmp_path / "b")
    expected = qcompiler.load(bundle, native=False).run(None, X)[0]
    library_of(bundle).unlink()
    with pytest.warns(UserWarning, match=r"\.so is missing; running without kernels") as told:
        session = qcompiler.load(bundle)
    assert told[0].filename == __file__  # it points at whoever loads the bundle
    np.testing.assert_array_equal(session.run(None, X)[0], expected)


def test_altered_library_is_not_loaded(tmp_path):
    bundle = compiled(tmp_path / "b")
    library = library_of(bundle)
    library.write_bytes(library.read_bytes() + b"\0")
    with pytest.raises(qcompiler.QCompilerError, match="differs from the hash"):
        qcompiler.load(bundle)


def test_stale_library_never_gives_wrong_numbers(tmp_path, monkeypatch):
    """One of other sources has ops of the same names, in another domain: the bodies run."""
    bundle = compiled(tmp_path / "b")
    monkeypatch.setattr("qcompiler.targets.catalog.fingerprint", lambda target: "of others")
    stale = library_of(compiled(tmp_path / "stale"))
    assert stale.name != library_of(bundle).name
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(stale))
    (y,) = ort.InferenceSession(bundle / "model.onnx", options).run(None, X)
    np.testing.assert_array_equal(y, qcompiler.load(bundle, native=False).run(None, X)[0])
    assert not np.array_equal(y, qcompiler.load(bundle).run(None, X)[0])


def test_two_bundles_in_one_process(tmp_path):
    small = {"x": X["x"][:, :32].copy()}
    first, second = compiled(tmp_path / "a"), compiled(tmp_path / "b", depth=32)
    sessions = [qcompiler.load(first), qcompiler.load(second)]
    for session, bundle, feeds in zip(sessions, (first, second), (X, small), strict=True):
        bodies = qcompiler.load(bundle, native=False).run(None, feeds)[0]
        assert sqnr(bodies, session.run(None, feeds)[0]) > 60


def test_two_libraries_in_one_session(tmp_path):
    """One model with the ops of both."""
    first, second = compiled(tmp_path / "a"), compiled(tmp_path / "b", depth=32)
    options = ort.SessionOptions()
    for bundle in (first, second):
        options.register_custom_ops_library(str(library_of(bundle)))
    both, more = without_bodies(first), without_bodies(second, "second_")
    for field in ("node", "initializer", "input", "output"):
        getattr(both.graph, field).extend(getattr(more.graph, field))
    known = {entry.domain for entry in both.opset_import}
    both.opset_import.extend(entry for entry in more.opset_import if entry.domain not in known)
    session = ort.InferenceSession(both.SerializeToString(), options)
    feeds = X | {"second_x": X["x"][:, :32].copy()}
    alone = [
        qcompiler.load(bundle).run(None, {"x": x})[0]
        for bundle, x in zip((first, second), feeds.values(), strict=True)
    ]
    for got, want in zip(session.run(None, feeds), alone, strict=True):
        np.testing.assert_array_equal(got, want)


def test_recompile_while_a_session_lives(tmp_path):
    bundle = compiled(tmp_path / "b", seed=0)
    session = qcompiler.load(bundle)
    before = session.run(None, X)[0]
    compiled(tmp_path / "b", seed=1)
    np.testing.assert_array_equal(session.run(None, X)[0], before)
    fresh = qcompiler.load(bundle)
    bodies = qcompiler.load(bundle, native=False).run(None, X)[0]
    assert sqnr(bodies, fresh.run(None, X)[0]) > 60
    assert sqnr(before, bodies) < 30


def test_same_bytes_twice(tmp_path):
    first, second = compiled(tmp_path / "a"), compiled(tmp_path / "b")
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in second.iterdir())
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name


def test_no_instruction_set_means_bodies(tmp_path):
    """What cannot run here is not registered; ORT then inlines the function."""
    bundle = compiled(tmp_path / "b")
    script = (
        "import numpy as np, qcompiler, sys\n"
        "x = np.load(sys.argv[2])\n"
        "np.save(sys.argv[3], qcompiler.load(sys.argv[1]).run(None, {'x': x})[0])"
    )
    np.save(tmp_path / "x.npy", X["x"])
    command = [sys.executable, "-c", script, bundle, tmp_path / "x.npy", tmp_path / "y.npy"]
    subprocess.run(command, check=True, env=os.environ | {"QCOMPILER_ISA": "none"})
    expected = qcompiler.load(bundle, native=False).run(None, X)[0]
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), expected)


def test_two_sessions_on_four_threads_each(tmp_path):
    """Large enough that each of their ops hands work out."""
    sizes = {"depth": 256, "width": 192}
    first, second = compiled(tmp_path / "a", **sizes), compiled(tmp_path / "b", seed=1, **sizes)
    sessions = [qcompiler.load(first, threads=4), qcompiler.load(second, threads=4)]
    inputs = [RNG.standard_normal((rows, 256), dtype=np.float32) for rows in (1, 40, 65, 130)]
    expected = [[s.run(None, {"x": x})[0] for x in inputs] for s in sessions]
    wrong: list[tuple[int, int]] = []

    def work(which: int, index: int) -> None:
        for turn in range(250):
            x = (index + turn) % len(inputs)
            result = sessions[which].run(None, {"x": inputs[x]})[0]
            if not np.array_equal(result, expected[which][x]):
                wrong.append((which, index))

    threads = [threading.Thread(target=work, args=(w, i)) for w in (0, 1) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong  # in 1,000 runs of either session


@pytest.mark.parametrize("rows", [0, 1, 7, 200])
@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_rows(tmp_path, rows, threads):
    bundle = compiled(tmp_path / "b")
    feeds = {"x": RNG.standard_normal((rows, 64), dtype=np.float32)}
    native = qcompiler.load(bundle, threads=threads).run(None, feeds)[0]
    bodies = qcompiler.load(bundle, native=False).run(None, feeds)[0]
    assert native.shape == bodies.shape == (rows, 64)
    assert rows == 0 or sqnr(bodies, native) > 50


def accuracy(session):
    right = total = 0
    for file in sorted((DIGITS / "test").glob("*.npz")):
        with np.load(file) as sample:
            logits = session.run(None, {"image": sample["image"]})[0]
            right += int((logits.argmax(1) == sample["label"]).sum())
            total += len(logits)
    return right / total


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_compiles_the_example(tmp_path, target):
    report = qcompiler.compile(
        DIGITS / "digits.onnx", target, tmp_path / "b", calibration=DIGITS / "calib"
    )
    before = accuracy(ort.InferenceSession(DIGITS / "digits.onnx"))
    assert accuracy(qcompiler.load(report.bundle, native=False)) > before - 0.01
    assert accuracy(qcompiler.load(report.bundle)) > before - 0.01
    assert report.bytes_after - report.bytes_of_kernels < report.bytes_before / 2
    products = [decision for decision in report.decisions if "QMatMul" in decision.op]
    quantized = sum(len(product.node.split(" + ")) for product in products)
    kept = sum(d.op == "MatMul" and "float is faster" in d.why for d in report.decisions)
    assert quantized + kept == 13
    assert kept <= 1  # ten columns are too few to gain anything


def test_moved_to_another_folder(digits, tmp_path):
    shutil.copytree(digits.bundle, tmp_path / "copy")
    image = {"image": RNG.random((3, 1, 20, 20), dtype=np.float32)}
    np.testing.assert_array_equal(
        qcompiler.load(tmp_path / "copy").run(None, image)[0],
        qcompiler.load(digits.bundle).run(None, image)[0],
    )


def test_options_may_be_used_again(tmp_path):
    bundle = compiled(tmp_path / "b")
    options = ort.SessionOptions()
    sessions = [qcompiler.load(bundle, session_options=options) for _ in range(2)]
    np.testing.assert_array_equal(*(session.run(None, X)[0] for session in sessions))
    with pytest.raises(qcompiler.QCompilerError, match="already hold the bundle's kernels"):
        qcompiler.load(bundle, session_options=options, native=False)


def test_kernels_inside_branches(tmp_path):
    rng = np.random.default_rng(0)
    model = model_of(
        "g (float[m,64] x, bool c) => (float[m,8] y) { y = If (c) "
        "<then_branch = a () => (float[m,8] p) { s = MatMul (x, w) p = Add (s, b) }, "
        "else_branch = b () => (float[m,8] n) { t = MatMul (x, w) n = Relu (t) }> }",
        {"w": rng.standard_normal((64, 8), np.float32), "b": rng.standard_normal(8, np.float32)},
    )
    everywhere = qcompiler.Pipeline.default(qcompiler.get_target("x86-int8"))
    report = qcompiler.compile(model, "x86-int8", tmp_path / "b", pipeline=everywhere)
    assert report.count("kernel") == 3
    for flag in (True, False):
        feeds = X | {"c": np.array(flag)}
        bodies = qcompiler.load(report.bundle, native=False).run(None, feeds)[0]
        assert sqnr(bodies, qcompiler.load(report.bundle).run(None, feeds)[0]) > 60


def test_what_killed_compilations_left_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone, running = (
        tmp_path / f".b.{platform.node()}-{pid}-left" for pid in (dead.pid, os.getpid())
    )
    for folder in (gone, running):
        folder.mkdir()
        (folder / "model.onnx").touch()
    (tmp_path / ".b.notes").mkdir()
    compiled(tmp_path / "b")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"b", running.name, ".b.notes"}
