"""Rows of tensors that passes learn from: on samples, or on inputs made up for a model."""

import numpy as np
import pytest
from golden import model_of
from norm_models import RNG, TOKENS, VOCABULARY, WEIGHTS, K

from qcompiler.calibrate import sample_tokens
from qcompiler.ir.errors import CalibrationError
from qcompiler.sampled_parts import sample_large
from qcompiler.samples import Samples


def test_made_up_token_ids_are_of_the_whole_vocabulary():
    model = model_of(TOKENS, WEIGHTS)
    rows = sample_tokens(model, ["x"])["x"]
    ids = [int(np.flatnonzero((WEIGHTS["table"] == row).all(1))[0]) for row in rows]
    assert len(ids) == 128
    assert max(ids) > VOCABULARY * 0.9


def test_samples_are_shared_out(tmp_path):
    model = model_of(TOKENS, WEIGHTS)
    for index, size in enumerate((1, 700)):
        np.savez(tmp_path / f"{index}.npz", ids=np.full((1, size), index))
    rows = sample_tokens(model, ["x"], Samples(tmp_path))["x"]
    assert 200 < len(rows) <= 256 + 1
    np.testing.assert_array_equal(rows[0], WEIGHTS["table"][0])
    np.testing.assert_array_equal(rows[-1], WEIGHTS["table"][1])


def test_a_large_model_is_sampled_part_by_part(tmp_path, monkeypatch):
    """The same rows, and never a session of the whole."""
    text = TOKENS.replace("float[b,s,48] o", "float[b,s,64] o, float[b,s,64] e")
    text = text.replace("o = MatMul (y, w)", "p = MatMul (y, q) e = Tanh (p) o = MatMul (e, q)")
    model = model_of(text, WEIGHTS | {"q": RNG.standard_normal((K, K), dtype=np.float32)})
    for index in range(2):
        np.savez(tmp_path / f"{index}.npz", ids=np.full((1, 9), index))
    expected = sample_tokens(model, ["e", "x", "y"], Samples(tmp_path))
    monkeypatch.setattr("qcompiler.calibrate._LARGEST", 0)
    with monkeypatch.context() as patch:
        patch.setattr("qcompiler.calibrate.Probe", None)
        found = sample_large(model, ["e", "x", "y"], Samples(tmp_path))
    assert set(found) == set(expected)
    for name, rows in expected.items():
        np.testing.assert_allclose(found[name], rows, rtol=1e-4, atol=1e-5)
    assert len(sample_large(model, ["o"], Samples(tmp_path))["o"]) == 18  # read by nothing


def test_what_does_not_run_is_not_sampled(tmp_path):
    text = TOKENS.replace(
        "y = Layer", "shape = Constant <value_ints = [7, 64]> () z = Reshape (x, shape) y = Layer"
    ).replace("(x, gamma", "(z, gamma")
    model = model_of(text.replace("float[b,s,", "float[7,").replace("[b,s]", "[1,s]"), WEIGHTS)
    assert sample_tokens(model, ["y"]) == {}
    np.savez(tmp_path / "a.npz", ids=np.zeros((1, 8), np.int64))
    with pytest.raises(CalibrationError, match="the model fails on .*a.npz"):
        sample_tokens(model, ["y"], Samples(tmp_path))
