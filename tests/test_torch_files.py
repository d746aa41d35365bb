"""Saved programs: read without pickle, and without running anything that is in the file."""

import io
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest

import qcompiler
from qcompiler.bench import bench
from qcompiler.compare import compare
from qcompiler.frontend import load_model
from qcompiler.ir.errors import ModelError

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("torch.ao.quantization.fx._decomposed")  # registers the quantized ops


class Doubled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(16, 8)

    def forward(self, x):
        return self.linear(torch.cat([x, x]))


class Rounded(Doubled):
    def forward(self, x):
        ends = (0.05, 3, -128, 127, torch.int8)
        stored = torch.ops.quantized_decomposed.quantize_per_tensor(x, *ends)
        return super().forward(torch.ops.quantized_decomposed.dequantize_per_tensor(stored, *ends))


def save(module, path):
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(module.eval(), (torch.zeros(2, 16),), dynamic_shapes=shapes)
    torch.export.save(program, path)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(Doubled(), tmp_path_factory.mktemp("saved") / "net.pt2")


def rewritten(saved, folder, edit):
    """A copy of the archive, each file of it as `edit(name, content)`; None leaves it out."""
    path = folder / "edited.pt2"
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = edit(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return path


def test_the_command_line_compiles_a_pt2(tmp_path):
    # In a process of its own, where nobody has registered the quantized ops yet.
    saved = save(Rounded(), tmp_path / "net.pt2")
    command = [sys.executable, "-m", "qcompiler", str(saved), "--target", "arm-int8", "-q"]
    subprocess.run([*command, "-o", str(tmp_path / "b")], check=True)
    session = qcompiler.load(tmp_path / "b")
    x = np.random.default_rng(0).standard_normal((5, 16), dtype=np.float32)
    with torch.no_grad():
        expected = Rounded()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, atol=0.05)


def test_a_bundle_is_compared_and_timed_with_its_pt2(saved, tmp_path):
    bundle = qcompiler.compile(saved, "arm-int8", tmp_path / "b").bundle
    (tmp_path / "data").mkdir()
    x = np.random.default_rng(0).standard_normal((5, 16), dtype=np.float32)
    np.savez(tmp_path / "data" / "0.npz", x=x)
    found = compare(saved, bundle, tmp_path / "data")
    assert found.outputs[0].sqnr > 20
    timed = bench(bundle, saved, threads=(1,), shapes={"x": (5, 16)}, seconds=0.05)
    assert timed.results[0].speedup > 0


def checkpoint(path):
    torch.save(Doubled().state_dict(), path)


def old_checkpoint(path):
    torch.save(Doubled().state_dict(), path, _use_new_zipfile_serialization=False)


def script(path):
    torch.jit.trace(Doubled(), (torch.zeros(2, 16),)).save(str(path))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (checkpoint, r"is a checkpoint .*load them into their module .*torch.export.save"),
        (old_checkpoint, r"a pickle, which is never read; build the module, export it"),
        (script, r"is TorchScript, which holds no program .*export the module it was made of"),
        (lambda path: path.write_bytes(b"no archive"), r"is not a \.pt2: corrupt or truncated"),
        (lambda path: path.write_bytes(b""), r"is not a \.pt2: corrupt or truncated"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt2", ".pt", ".pth"])
def test_files_that_are_no_program(tmp_path, write, message, suffix):
    path = tmp_path / f"model{suffix}"
    write(path)
    with pytest.raises(ModelError, match=message):
        load_model(path)


def test_a_truncated_and_a_damaged_archive(saved, tmp_path):
    content = bytearray(saved.read_bytes())
    path = tmp_path / "cut.pt2"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=r"cut\.pt2 is not a .pt2: corrupt or truncated"):
        load_model(path)
    content[content.index(Doubled().linear.weight.detach().numpy().tobytes()[:16])] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"cut\.pt2 is corrupt: the checksum of .*weight_0"):
        load_model(path)


def test_an_archive_of_something_else(tmp_path):
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(ModelError, match="is a zip file, but neither an ONNX model nor a .pt2"):
        load_model(path)


class Marker:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("wrap", ["pickle", "torch.save"])
def test_pickled_example_inputs_are_not_opened(saved, tmp_path, wrap):
    stream = io.BytesIO()
    (pickle.dump if wrap == "pickle" else torch.save)(Marker(tmp_path / "ran"), stream)
    path = rewritten(
        saved, tmp_path, lambda name, old: stream.getvalue() if "sample_inputs" in name else old
    )
    with pytest.raises(ModelError, match="example inputs that are more than tensors, as a pickle"):
        load_model(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("part", "old", "new", "message"),
    [
        ("weights_config", b'"use_pickle": false', b'"use_pickle": true', "as a pickle, as torch"),
        ("weights_config", b'"weight_0"', b'"opaque_obj_0"', "as a pickle, as torch"),
        (
            "models/model",
            b"Symbol('",
            b"__import__('",
            "__import__.*is no expression of a dimension",
        ),
        ("models/model", b'"name": "cat"', b'"name": "cat):\\n"', "is no name of a value"),
        ("models/model", b"aten.cat.", b"my_ops.cat.", r"torch.ops.my_ops.cat.default, which no"),
        (
            "models/model",
            b"ops.aten.cat.",
            b"ops.torchvision.x.",
            r"torchvision.x.default(; install|, which no)",
        ),
        ("models/model", b'"graph_module"', b'"graph"', "is not readable by torch .*corrupt"),
    ],
)
def test_what_would_run_or_be_unpickled_is_refused(saved, tmp_path, part, old, new, message):
    changed = []

    def edit(name, content):
        if part in name and old in content:
            changed.append(name)
            return content.replace(old, new)
        return content

    path = rewritten(saved, tmp_path, edit)
    assert changed
    with pytest.raises(ModelError, match=message):
        load_model(path)


def test_compiled_code_and_older_layouts_are_refused(saved, tmp_path):
    path = rewritten(saved, tmp_path, lambda name, old: old)
    for extra, message in (
        ("net/data/weights/model.pt", "stores its weights as a pickle, as an older torch did"),
        ("net/data/aotinductor/model/a.so", r"holds compiled code \(AOTInductor\)"),
        ("version", "mixes two layouts"),
    ):
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(extra, b"x")
        with pytest.raises(ModelError, match=message):
            load_model(path)
