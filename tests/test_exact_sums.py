"""Sessions ask for exact sums where those of int8 saturate: bundles give what models mean."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from golden import model_of
from saturating_weights import HEAD, LARGE, PAIR, X, plainly

import qcompiler
from qcompiler.compare import compare
from qcompiler.ir.region import Region
from qcompiler.session_options import exact_sums, new_session_options, sums_saturate
from qcompiler.targets.cache import KernelCache
from qcompiler.targets.library import build_library


@pytest.mark.parametrize("saturate", [True, False])
def test_exact_sums_are_asked_for_only_where_sums_saturate(saturate, monkeypatch):
    """With VNNI they are exact, and products by uint8 weights twice as slow."""
    monkeypatch.setattr("qcompiler.session_options.sums_saturate", lambda: saturate)
    assert asks(new_session_options()) is saturate


def asks(options):
    try:
        return options.get_session_config_entry("session.x64quantprecision") == "1"
    except RuntimeError:
        return False


def test_a_library_asks_for_them_where_sums_saturate(tmp_path):
    library = build_library([Region("Quantize", (("K", 8),))], "q.asks", tmp_path / "q.so",
                            cache=KernelCache())  # fmt: skip
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library.path))
    assert asks(options) is sums_saturate()


def test_what_a_user_asks_of_a_session_stays():
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "0")
    assert exact_sums(options) is options
    assert options.get_session_config_entry("session.x64quantprecision") == "0"


PRODUCT = f"{HEAD}{{ {PAIR}f = DequantizeLinear <axis = 1> (w, ws) y = MatMul (d, f) }}"


@pytest.mark.parametrize("target", ["x86-int8", "arm-int8"])
def test_a_quantized_model_is_compared_with_what_it_means(target, tmp_path):
    """In ONNX Runtime's fused product both sides would saturate alike, or one of them."""
    source, samples = tmp_path / "m.onnx", tmp_path / "data"
    onnx.save(ir.to_proto(model_of(PRODUCT, LARGE)), source)
    samples.mkdir()
    np.savez(samples / "0.npz", **X)
    report = qcompiler.compile(source, target, tmp_path / "b")
    (output,) = compare(source, report.bundle, samples).outputs
    assert output.sqnr > 100
    (output,) = compare(source, report.bundle, samples, native=False).outputs
    assert output.sqnr > 100


@pytest.mark.parametrize("product", ["y = MatMul (x, f)", "a = Relu (x) y = MatMul (a, f)"])
@pytest.mark.parametrize("weight", ["<axis = 1> (w, ws)", "<axis = 0, block_size = 16> (w, wb)"])
def test_a_bundle_whose_weights_alone_are_int8(weight, product, tmp_path):
    """With exact sums, ORT 1.32 would fail on such a DQ without a zero point."""
    model = model_of(f"{HEAD}{{ f = DequantizeLinear {weight} {product} }}", LARGE)
    (expected,) = plainly(model, X)
    report = qcompiler.compile(model, "x86-int8", tmp_path / "b")
    (y,) = qcompiler.load(report.bundle).run(None, X)
    np.testing.assert_allclose(y, expected, rtol=2e-2)
