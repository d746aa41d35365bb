"""The files of a checkpoint: whole, in several with an index, configured, damaged."""

import json

import numpy as np
import pytest
from checkpoints import LAYER, gptq, model, write

from qcompiler.ir.errors import ModelError
from qcompiler.passes.widen_constants import dequantized_constant
from qcompiler.quantized_checkpoint import take_over_weights
from qcompiler.safetensors import SafeTensors


@pytest.mark.parametrize("config", ["quantize_config.json", "config.json"])
def test_the_second_format_of_gptq(tmp_path, config):
    file, floats = gptq(tmp_path, 4, less=0)
    content = {"checkpoint_format": "gptq_v2"}
    content = content if config.startswith("q") else {"quantization_config": content}
    (tmp_path / config).write_text(json.dumps(content))
    for where in (file, tmp_path):
        made = model()
        take_over_weights(made, where)
        (node,) = [node for node in made.graph if node.op_type == "MatMul"]
        np.testing.assert_array_equal(dequantized_constant(node.inputs[1]), floats)


@pytest.mark.parametrize("content", ["[]", "null", '{"quantization_config": null}'])
def test_a_configuration_that_says_nothing(tmp_path, content):
    file, floats = gptq(tmp_path, 4)
    (tmp_path / "config.json").write_text(content)
    made = model()
    take_over_weights(made, file)
    (node,) = [node for node in made.graph if node.op_type == "MatMul"]
    np.testing.assert_array_equal(dequantized_constant(node.inputs[1]), floats)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ModelError, match="no checkpoint: .*no.safetensors does not exist; give"):
        SafeTensors(tmp_path / "no.safetensors")
    with pytest.raises(ModelError, match="holds no .safetensors file"):
        SafeTensors(tmp_path)
    bad = tmp_path / "bad.safetensors"
    for content in (b"", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]"):
        bad.write_bytes(content)
        with pytest.raises(ModelError, match="bad.safetensors is no whole safetensors file"):
            SafeTensors(bad)
    whole = write(tmp_path / "bad.safetensors", {"a": np.zeros(100, np.float32)}).read_bytes()
    bad.write_bytes(whole[:-4])
    with pytest.raises(ModelError, match="'a' does not lie within it"):
        SafeTensors(bad)
    with pytest.raises(ModelError, match="holds no qweight: it is no checkpoint of GPTQ or AWQ"):
        take_over_weights(model(), write(bad, {"a": np.zeros(100, np.float32)}))


def sharded(folder, places=None):
    """A layer of which each part is in a file of its own, and an index; and what it stands for."""
    file, floats = gptq(folder, 4)
    held = SafeTensors(file)
    parts = {name: held[name] for name in held}
    file.unlink()
    shards = {name: f"model-{number:05}-of-00004.safetensors"
              for number, name in enumerate(sorted(parts), 1)}  # fmt: skip
    for name, shard in shards.items():
        write(folder / shard, {name: parts[name]})
    index = json.dumps({"metadata": {}, "weight_map": shards | (places or {})})
    (folder / "model.safetensors.index.json").write_text(index)
    return shards, floats


def test_a_checkpoint_in_several_files(tmp_path):
    _, floats = sharded(tmp_path)
    # Some folders hold the same weights once more, in a form that the index does not know.
    write(tmp_path / "consolidated.safetensors", {f"{LAYER}.scales": np.zeros(3, np.float32)})
    made = model()
    assert take_over_weights(made, tmp_path) == [LAYER]
    (node,) = [node for node in made.graph if node.op_type == "MatMul"]
    np.testing.assert_array_equal(dequantized_constant(node.inputs[1]), floats)


def test_a_file_that_was_not_downloaded(tmp_path):
    """Its layers would stay float, and nobody would hear of it."""
    shards, _ = sharded(tmp_path)
    (tmp_path / shards[f"{LAYER}.qweight"]).unlink()
    with pytest.raises(ModelError, match="names model-0000.-of-00004.safetensors, which is not th"):
        take_over_weights(model(), tmp_path)


@pytest.mark.parametrize(
    ("places", "why"),
    [
        ({"other.qweight": "model-00001-of-00004.safetensors"}, "00001.* holds no 'other.qweight'"),
        ({f"{LAYER}.g_idx": "model-00004-of-00004.safetensors"}, "00004.* holds no .*g_idx'"),
        ({"other.qweight": "../model.safetensors"}, "'../model.safetensors', which is no file of"),
    ],
)
def test_an_index_that_is_wrong(tmp_path, places, why):
    (tmp_path / "checkpoint").mkdir()
    sharded(tmp_path / "checkpoint", places)
    with pytest.raises(ModelError, match=why):
        take_over_weights(model(), tmp_path / "checkpoint")


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', '{"metadata": {}}'])
def test_an_index_that_is_none(tmp_path, content):
    gptq(tmp_path, 4)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match="index.json is no index of a checkpoint: "):
        take_over_weights(model(), tmp_path)


def test_of_two_indices_one_is_to_be_left(tmp_path):
    sharded(tmp_path)
    (tmp_path / "consolidated.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ModelError, match="2 indices: consolidated.*, model.*; leave there that of"):
        take_over_weights(model(), tmp_path)
