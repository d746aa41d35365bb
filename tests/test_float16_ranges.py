"""What tensors reach, on which convert-float16 decides."""

import numpy as np
import onnx_ir as ir
import pytest
from float16_models import FEEDS, LAYERS, MORE, named

from qcompiler.ir.stages import Stage
from qcompiler.passes.float16_ranges import magnitudes
from qcompiler.pipeline import Pipeline
from qcompiler.sampled_parts import sample_large
from qcompiler.samples import Samples
from qcompiler.targets.catalog import TARGETS


@pytest.mark.parametrize("target", ["cuda-int4", "cuda-int8"])
def test_a_large_quantized_model_is_run_part_by_part(target, tmp_path, monkeypatch):
    """The same magnitudes, and never a session of the whole."""
    pipeline = Pipeline.default(TARGETS[target]).remove("convert-float16")
    model = pipeline.up_to(Stage.QUANTIZED).run(named(LAYERS, **MORE))
    assert model.functions
    for index in range(2):
        np.savez(tmp_path / f"{index}.npz", **{k: v * (index + 1) for k, v in FEEDS.items()})
    made = [value for node in model.graph for value in node.outputs]
    values = [value for value in made if value.dtype is ir.DataType.FLOAT]

    def sample(copy, names):
        asked.append(len(names))
        return sample_large(copy, names, Samples(tmp_path))

    asked = []
    expected = magnitudes(model, values, sample)
    monkeypatch.setattr("qcompiler.calibrate._LARGEST", 0)
    monkeypatch.setattr("qcompiler.passes.float16_ranges._PART", 0)
    monkeypatch.setattr("qcompiler.calibrate.Probe", None)
    found = magnitudes(model, values, sample)
    assert asked[0] == 1 and asked[1] > 3
    assert set(found) == set(values)
    for value in values:
        assert found[value] == pytest.approx(expected[value], rel=1e-5)
