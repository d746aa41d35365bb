"""Weights of GPTQ and AWQ checkpoints: files made here, by the layouts as they are documented."""

import json

import numpy as np
import onnx_ir as ir
import pytest
from golden import model_of, run
from terminal import fails, qcompile

from qcompiler.ir.decisions import decision_of
from qcompiler.ir.errors import ModelError, OptionError
from qcompiler.passes.widen_constants import dequantized_constant
from qcompiler.quantized_checkpoint import take_over_weights
from qcompiler.safetensors import SafeTensors

K, N, GROUP = 64, 32, 16
RNG = np.random.default_rng(0)
W = RNG.standard_normal((K, N), dtype=np.float32)
FEEDS = {"x": RNG.standard_normal((5, K), dtype=np.float32)}
LAYER = "model.layers.0.mlp.up_proj"


def write(path, tensors):
    """The format, as its documentation has it."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    kinds = {"float32": "F32", "float16": "F16", "int32": "I32"}
    for name, array in tensors.items():
        header[name] = {"dtype": kinds[str(array.dtype)], "shape": list(array.shape),
                        "data_offsets": [offset, offset + array.nbytes]}  # fmt: skip
        offset += array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text
                     + b"".join(array.tobytes() for array in tensors.values()))  # fmt: skip
    return path


def model(text=f"g (float[m,{K}] x) => (float[m,{N}] y) {{ y = MatMul (x, w) }}"):
    ones = {"gamma": np.ones(K, np.float32), "router": np.ones((K, 4), np.float32)}
    made = model_of(text, {"w": W} | ones)
    for node in made.graph:
        if node.op_type == "MatMul":
            node.name = "/model/layers.0/mlp/up_proj/MatMul"
    for value in list(made.graph.initializers.values()):
        if value.name == "gamma":
            value.name = "model.norm.weight"
    return made


def rounded(bits, order=None):
    """Codes [K, N], zero points and scales [G, N], the group of each input, and the floats."""
    codes = RNG.integers(0, 2**bits, (K, N))
    zeros, scales = (
        RNG.integers(0, 2**bits, (K // GROUP, N)),
        RNG.uniform(0.01, 0.1, (K // GROUP, N)),
    )
    scales = scales.astype(np.float16)
    groups = np.arange(K) // GROUP if order is None else (np.arange(K) // GROUP)[order]
    floats = (codes - zeros[groups]).astype(np.float32) * scales.astype(np.float32)[groups]
    return codes, zeros, scales, groups, floats


def pack_rows(codes, bits):
    """Along the first axis, the way AutoGPTQ does it word by word."""
    rows, width = codes.shape
    words = np.zeros((rows * bits // 32, width), np.uint64)
    for row in range(rows):
        word, shift = divmod(row * bits, 32)
        value = codes[row].astype(np.uint64)
        words[word] |= (value << np.uint64(shift)) & np.uint64(0xFFFFFFFF)
        if shift + bits > 32:
            words[word + 1] |= value >> np.uint64(32 - shift)
    return words.astype(np.uint32).view(np.int32)


def gptq(tmp_path, bits, order=None, less=1, **change):
    codes, zeros, scales, groups, floats = rounded(bits, order)
    stored = (zeros - less) & (2**bits - 1)
    tensors = {
        f"{LAYER}.qweight": pack_rows(codes, bits),
        f"{LAYER}.qzeros": np.ascontiguousarray(pack_rows(stored.T, bits).T),
        f"{LAYER}.scales": scales,
        f"{LAYER}.g_idx": groups.astype(np.int32),
    }
    tensors |= {f"{LAYER}.{part}": array for part, array in change.items()}
    tensors = {name: array for name, array in tensors.items() if array is not None}
    return write(tmp_path / "model.safetensors", tensors), floats


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(tmp_path, bits):
    file, floats = gptq(tmp_path, bits)
    made = model()
    assert take_over_weights(made, file) == [LAYER]
    (node,) = [node for node in made.graph if node.op_type == "MatMul"]
    np.testing.assert_array_equal(dequantized_constant(node.inputs[1]), floats)
    assert node.inputs[1].producer().attributes.get_int("block_size") == GROUP
    assert node.inputs[1].producer().inputs[0].dtype is (
        ir.DataType.INT8 if bits == 8 else ir.DataType.INT4
    )
    assert decision_of(node).why == "weights of gptq as model.safetensors has them"
    got = run(made, FEEDS, plainly=True)[0]
    np.testing.assert_allclose(got, FEEDS["x"] @ floats, rtol=1e-4, atol=1e-4)


def test_gptq_in_activation_order(tmp_path):
    file, floats = gptq(tmp_path, 4, RNG.permutation(K))
    made = model(f"g (float[m,{K}] x) => (float[m,{N}] y) {{ y = MatMul (x, w) }}")
    take_over_weights(made, file)
    assert [node.op_type for node in made.graph] == ["DequantizeLinear", "Gather", "MatMul"]
    got = run(made, FEEDS, plainly=True)[0]
    np.testing.assert_allclose(got, FEEDS["x"] @ floats, rtol=1e-4, atol=1e-4)


def test_a_last_group_that_is_shorter(tmp_path):
    """64 inputs in groups of 24: only g_idx says so."""
    groups, scales = (np.arange(K) // 24).astype(np.int32), np.full((3, N), 0.5, np.float16)
    codes, zeros = RNG.integers(0, 16, (K, N)), RNG.integers(1, 16, (3, N))
    change = {"qweight": pack_rows(codes, 4), "scales": scales,
              "qzeros": np.ascontiguousarray(pack_rows((zeros - 1).T, 4).T)}  # fmt: skip
    file, _ = gptq(tmp_path, 4, g_idx=groups, **change)
    made = model()
    take_over_weights(made, file)
    (node,) = [node for node in made.graph if node.op_type == "MatMul"]
    floats = (codes - zeros[groups]) * np.float32(0.5)
    np.testing.assert_array_equal(dequantized_constant(node.inputs[1]), floats)
    file, _ = gptq(tmp_path, 4, g_idx=None, **change)
    with pytest.raises(ModelError, match="3 groups of 64 inputs together, .* no g_idx that says"):
        take_over_weights(model(), file)


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


def awq(tmp_path, **more):
    codes, zeros, scales, _, floats = rounded(4)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def pack(table):
        words = np.zeros((len(table), table.shape[1] // 8), np.uint32)
        for i, column in enumerate(order):
            words |= table[:, column::8].astype(np.uint32) << np.uint32(4 * i)
        return words.view(np.int32)

    tensors = {f"{LAYER}.qweight": pack(codes), f"{LAYER}.qzeros": pack(zeros),
               f"{LAYER}.scales": scales}  # fmt: skip
    return write(tmp_path / "model.safetensors", tensors | more), floats


NORM = (
    f"g (float[m,{K}] x) => (float[m,{N}] y) "
    "{ t = LayerNormalization <axis = -1> (x, gamma) y = MatMul (t, w) }"
)


ROUTED = (
    f"g (float[m,{K}] x) => (float[m,{N}] y, float[m,4] r) "
    "{ t = LayerNormalization <axis = -1> (x, gamma) y = MatMul (t, w) r = MatMul (t, router) }"
)


def test_awq_with_its_norm(tmp_path):
    gamma = RNG.uniform(0.5, 2, K).astype(np.float16)
    file, floats = awq(tmp_path, **{"model.norm.weight": gamma})
    made = model(NORM)
    take_over_weights(made, file)
    x = FEEDS["x"] - FEEDS["x"].mean(1, keepdims=True)
    x /= np.sqrt(np.square(x).mean(1, keepdims=True) + 1e-5)
    expected = x * gamma.astype(np.float32) @ floats
    np.testing.assert_allclose(run(made, FEEDS, plainly=True)[0], expected, rtol=1e-3, atol=1e-3)


def test_a_router_beside_layers_of_awq(tmp_path):
    """It reads the norm that was scaled for the experts, and stays float."""
    gamma = RNG.uniform(0.5, 2, K).astype(np.float16)
    router = RNG.standard_normal((4, K)).astype(np.float16)
    more = {"model.norm.weight": gamma, "model.layers.0.mlp.gate.weight": router,
            "model.embed_tokens.weight": np.ones((9, K), np.float16)}  # fmt: skip
    file, _ = awq(tmp_path, **more)
    made = model(ROUTED)
    made.graph[2].name = "/model/layers.0/mlp/gate/MatMul"
    take_over_weights(made, file)
    x = FEEDS["x"] - FEEDS["x"].mean(1, keepdims=True)
    x /= np.sqrt(np.square(x).mean(1, keepdims=True) + 1e-5)
    expected = x * gamma.astype(np.float32) @ router.T.astype(np.float32)
    np.testing.assert_allclose(run(made, FEEDS, plainly=True)[1], expected, rtol=1e-3, atol=1e-3)
    file, _ = awq(tmp_path, **more | {"model.layers.0.mlp.gate.weight": router[:3]})
    made = model(ROUTED)
    made.graph[2].name = "/model/layers.0/mlp/gate/MatMul"
    with pytest.raises(ModelError, match=r"gate.weight' is \[3, 64\], in the model \[4, 64\]"):
        take_over_weights(made, file)


def test_factors_of_an_activation(tmp_path):
    """AWQ divides what GELU makes by them, in a node of its own."""
    file, _ = awq(tmp_path, **{"model.layers.0.mlp.act.scales": np.ones(K, np.float16)})
    with pytest.raises(ModelError, match="'model.layers.0.mlp.act.scales' divides an activation"):
        take_over_weights(model(), file)


def test_what_does_not_fit(tmp_path):
    file, _ = awq(tmp_path, **{"model.final_norm.weight": np.ones(K, np.float16)})
    with pytest.raises(ModelError, match="'model.final_norm.weight' is no constant of the model"):
        take_over_weights(model(NORM), file)
    file, _ = gptq(tmp_path, 4, qzeros=None)
    with pytest.raises(ModelError, match=f"has no {LAYER}.qzeros beside its qweight"):
        take_over_weights(model(), file)
    file, _ = gptq(tmp_path, 4, qweight=np.zeros((5, 7), np.int32))
    with pytest.raises(ModelError, match=r"qweight is int32 \[5, 7\], which is no packed .*64, 32"):
        take_over_weights(model(), file)
    file, _ = gptq(tmp_path, 4, g_idx=np.zeros(K, np.int32))
    with pytest.raises(ModelError, match="up_proj.*: 4 groups of 64 inputs, not all alike"):
        take_over_weights(model(), file)
    file, _ = gptq(tmp_path, 4, g_idx=np.full(K, -1, np.int32))
    with pytest.raises(ModelError, match="scales, qzeros and g_idx of .* do not fit each other"):
        take_over_weights(model(), file)
    file, _ = gptq(tmp_path, 4, g_idx=np.zeros(3, np.int32))
    with pytest.raises(ModelError, match="scales, qzeros and g_idx of .* do not fit each other"):
        take_over_weights(model(), file)


@pytest.mark.parametrize(("change", "why"), [
    ({"qweight": np.zeros(8, np.int32)}, r"up_proj.qweight is int32 \[8\], which is no packed"),
    ({"qweight": np.ones((8, N), np.float32)}, "up_proj.qweight is float32 .* no packed form"),
    ({"scales": np.zeros((0, N), np.float16)}, "qzeros and scales of .* are no packed tables"),
    ({"qzeros": np.ones(4, np.int32)}, "qzeros and scales of .* are no packed tables"),
    ({"scales": np.full((K // GROUP, N), np.nan, np.float16)}, "scales of .* hold NaN or Inf"),
    ({"scales": np.ones((K // GROUP, 16), np.float16),
      "qzeros": np.ones((K // GROUP, 2), np.int32)},
     "scales, qzeros and g_idx of .* do not fit each other"),
])  # fmt: skip
def test_damaged_parts_of_a_layer(tmp_path, change, why):
    file, _ = gptq(tmp_path, 4, **change)
    with pytest.raises(ModelError, match=why):
        take_over_weights(model(), file)


def test_two_layers_are_not_one_product(tmp_path):
    file, _ = gptq(tmp_path, 4)
    held = SafeTensors(file)
    write(file, {f"{layer}.{part}": held[f"{LAYER}.{part}"]
                 for layer in "ab" for part in ("qweight", "qzeros", "scales")})  # fmt: skip
    made = model()
    made.graph[0].name = "n"
    with pytest.raises(ModelError, match="layers 'a' and 'b' would both be n; .*--name b=NODE"):
        take_over_weights(made, file, {"a": "n", "b": "n"})


def test_all_products_of_a_weight(tmp_path):
    file, floats = gptq(tmp_path, 4, order=RNG.permutation(K))
    made = model(
        f"g (float[m,{K}] x) => (float[m,{N}] y, float[m,{N}] z) "
        "{ y = MatMul (x, w) n = Neg (x) z = MatMul (n, w) }"
    )
    take_over_weights(made, file, {LAYER: "w"})
    y, z = run(made, FEEDS, plainly=True)
    np.testing.assert_allclose(y, FEEDS["x"] @ floats, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(y, -z)


def test_a_model_in_float16(tmp_path):
    file, floats = gptq(tmp_path, 4)
    made = model_of(
        f"g (float16[m,{K}] x) => (float16[m,{N}] y) {{ y = MatMul (x, w) }}",
        {"w": W.astype(np.float16)},
    )
    take_over_weights(made, file, {LAYER: "w"})
    x = FEEDS["x"].astype(np.float16)
    y = run(made, {"x": x}, plainly=True)[0]
    assert y.dtype == np.float16
    np.testing.assert_allclose(y, x.astype(np.float32) @ floats, rtol=0.01, atol=0.05)


@pytest.mark.parametrize("content", ["[]", "null", '{"quantization_config": null}'])
def test_a_configuration_that_says_nothing(tmp_path, content):
    file, floats = gptq(tmp_path, 4)
    (tmp_path / "config.json").write_text(content)
    made = model()
    take_over_weights(made, file)
    (node,) = [node for node in made.graph if node.op_type == "MatMul"]
    np.testing.assert_array_equal(dequantized_constant(node.inputs[1]), floats)


def test_awq_has_no_zero_points_less_one(tmp_path):
    file, _ = awq(tmp_path)
    with pytest.raises(OptionError, match="zeros_less_one=False .--zeros.: .* is of AWQ"):
        take_over_weights(model(), file, zeros_less_one=False)


@pytest.mark.parametrize(
    ("name", "weight"),
    [("/model/layers.0/mlp/up_proj/Gemm", "onnx_7"), ("", f"{LAYER}.weight")],
)
@pytest.mark.parametrize(
    "call",
    ["y = Gemm <transB = 1> (x, wt, b)", "w = Transpose (wt) p = MatMul (x, w) y = Add (p, b)"],
)
def test_a_weight_that_is_turned_over(tmp_path, call, name, weight):
    """As torch's exporters write a Linear of two dimensions."""
    file, floats = gptq(tmp_path, 4)
    made = model_of(
        f"g (float[m,{K}] x) => (float[m,{N}] y) {{ {call} }}",
        {"wt": np.ascontiguousarray(W.T), "b": np.ones(N, np.float32)},
    )
    for node in made.graph:
        if node.op_type in ("Gemm", "MatMul"):
            node.name = name
    made.graph.initializers["wt"].name = weight
    take_over_weights(made, file)
    got = run(made, FEEDS, plainly=True)[0]
    np.testing.assert_allclose(got, FEEDS["x"] @ floats + 1, rtol=1e-4, atol=1e-4)


def test_a_layer_of_another_name(tmp_path):
    file, floats = gptq(tmp_path, 4)
    made = model()
    made.graph[0].name = "up"
    with pytest.raises(ModelError, match=f"no MatMul of the model has the name of layer {LAYER!r}"):
        take_over_weights(made, file)
    take_over_weights(made, file, {LAYER: "up"})
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


def test_on_the_command_line(tmp_path):
    file, floats = gptq(tmp_path, 4)
    made = model()
    made.graph[0].name = "up"
    ir.save(made, tmp_path / "m.onnx")
    words = ["take-weights", tmp_path / "m.onnx", file]
    result = qcompile(*words, tmp_path / "out.onnx", "--name", f"{LAYER}=up")
    assert result.exit_code == 0, result.output
    assert "1 layers of " in result.stdout and "Written to" in result.stdout
    loaded = ir.load(tmp_path / "out.onnx")
    (node,) = [node for node in loaded.graph if node.op_type == "MatMul"]
    np.testing.assert_array_equal(dequantized_constant(node.inputs[1]), floats)
    result = qcompile(*words, tmp_path / "two.onnx", "--name", f"{LAYER}=up", "--json")
    assert json.loads(result.stdout)["layers"] == [LAYER]


@pytest.mark.parametrize(
    ("code", "message", "more"),
    [
        (2, "--name 'up' is not LAYER=NODE", ["--name", "up"]),
        (2, "the layer 'a' is given twice", ["--name", "a=up", "--name", "a=down"]),
        (1, "has no layer 'model.layers.0.mlp.up_prjo'; did you mean 'model.layers.0.mlp.up_proj'",
         ["--name", "model.layers.0.mlp.up_prjo=up"]),
        (1, "no MatMul of the model has the name of layer", []),
        (1, "no MatMul of the model has the name of layer", ["--name", f"{LAYER}=down"]),
    ],
)  # fmt: skip
def test_what_the_command_line_refuses(tmp_path, code, message, more):
    file, _ = gptq(tmp_path, 4)
    made = model()
    made.graph[0].name = "up"
    ir.save(made, tmp_path / "m.onnx")
    fails(code, message, "take-weights", tmp_path / "m.onnx", file, tmp_path / "out.onnx", *more)
    assert not (tmp_path / "out.onnx").exists()


def test_the_command_line_names_files_that_are_not_there(tmp_path):
    file, _ = gptq(tmp_path, 4)
    ir.save(model(), tmp_path / "m.onnx")
    out = tmp_path / "out.onnx"
    fails(1, "no.safetensors does not exist", "take-weights", tmp_path / "m.onnx",
          tmp_path / "no.safetensors", out)  # fmt: skip
    fails(1, "no.onnx", "take-weights", tmp_path / "no.onnx", file, out)
    fails(1, "is the input", "take-weights", tmp_path / "m.onnx", file, tmp_path / "m.onnx")
