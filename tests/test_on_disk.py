"""Large constants lie on disk."""

import gc
import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from golden import model_of

from qcompiler import frontend, model_file
from qcompiler.ir import on_disk as module
from qcompiler.ir.graph import new_initializer
from qcompiler.ir.on_disk import let_go, on_disk
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.planned_products import sampled_products
from qcompiler.targets.catalog import TARGETS

LARGE = np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)


def mapped(array):
    return module._mapping(array) is not None


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN])
def test_a_large_array_is_mapped_and_holds_the_same(dtype):
    array = (LARGE % 8).astype(dtype.numpy()).T  # not contiguous
    graph = model_of("g (float[2] x) => (float[2] y) { y = Neg (x) }").graph
    value = new_initializer(graph, "w", array, dtype)
    found = value.const_value
    assert mapped(found.numpy()) and found.dtype is dtype
    let_go(value)
    np.testing.assert_array_equal(found.numpy().astype(np.float32), array.astype(np.float32))
    assert found.tobytes() == ir.Tensor(np.ascontiguousarray(array), dtype=dtype).tobytes()
    with pytest.raises(ValueError, match="read-only"):
        found.numpy()[0] = 0


def test_what_is_small_or_mapped_already_stays():
    assert on_disk(LARGE[:8]) is not None and on_disk(LARGE[:8].copy()).flags.writeable
    once = on_disk(LARGE)
    assert on_disk(once) is once and on_disk(once[1:]).base is not None


def test_it_stays_in_memory_where_the_disk_refuses(monkeypatch):
    def full(**options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.tempfile, "TemporaryFile", full)
    assert on_disk(LARGE) is LARGE


def test_no_file_is_left(monkeypatch, tmp_path):
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    array = on_disk(LARGE)
    assert mapped(array) and not list(tmp_path.iterdir())
    view = array[3]
    del array
    gc.collect()
    np.testing.assert_array_equal(view, LARGE[3])


def test_onnx_runtime_looks_at_a_model_without_its_weights(monkeypatch, tmp_path):
    """The checker wants a shape of the output, so that ONNX Runtime is asked."""

    def anonymous():
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) << 10

    def opened(*args, **kwargs):
        before = anonymous()
        session = open_session(*args, **kwargs)
        grown.append(anonymous() - before)
        return session

    open_session, grown, size = frontend.open_session, [], 4096
    weight = np.ones((size, size), np.float32)
    model = model_of("g (float[2,4096] x) => (float y) { y = MatMul (x, w) }", {"w": weight})
    proto = ir.to_proto(model)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    place = tmp_path / "m.onnx"
    onnx.save(proto, place, save_as_external_data=True, location="w.bin")
    monkeypatch.setattr(frontend, "open_session", opened)
    frontend.load_model(place)
    assert len(grown) == 1 and grown[0] < weight.nbytes / 2


def resident(path):
    """Bytes of a mapped file that are in memory now."""
    smaps = Path("/proc/self/smaps").read_text()
    pages = re.findall(
        rf"{re.escape(str(path))}.*?\n.*?^Rss:\s+(\d+) kB", smaps, re.DOTALL | re.MULTILINE
    )
    return sum(map(int, pages)) << 10


def test_columns_of_weights_do_not_keep_the_model_in_memory(tmp_path):
    """They lie on all of its pages; passes look at those of one product after the other."""
    weights = {name: LARGE + 1 for name in "abc"}
    text = (
        "g (float[2,1024] x) => (float[2,1024] y) "
        "{ p = MatMul (x, a) q = MatMul (p, b) y = MatMul (q, c) }"
    )
    ir.save(model_of(text, weights), tmp_path / "m.onnx", external_data="w.bin")
    model = ir.load(tmp_path / "m.onnx")
    AssignPrecision(TARGETS["x86-int4"].scheme)(model)
    with sampled_products(model, tokens_of, "looked", made_up=False, ranges=None) as sites:
        for site, _ in sites:
            (columns,) = site.weights().values()
            assert columns.shape[0] == 1024 and resident(tmp_path / "w.bin") < LARGE.nbytes / 2


def test_a_model_that_is_written_is_not_in_memory(monkeypatch, tmp_path):
    """What passes made of its weights lies in files without names, and is read from there."""
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(model_file, "_INLINE_LIMIT", 0)
    text = "g (float[2,1024] x) => (float[2,1024] y) { y = Sum (x, a, b, c, d, e, f) }"
    model = model_of(text, dict.fromkeys("abcdef", LARGE))
    for node in model.graph:
        for index in range(1, 7):
            node.replace_input_with(index, new_initializer(model.graph, "w", LARGE + index))
    model_file.save_model(model, tmp_path / "copy.onnx")
    assert resident(tmp_path / "#") < 3 * LARGE.nbytes
    again = ir.load(tmp_path / "copy.onnx").graph.initializers["w_3"].const_value
    np.testing.assert_array_equal(again.numpy(), LARGE + 4)


def tokens_of(model, names):
    return {name: LARGE[:8] for name in names}
