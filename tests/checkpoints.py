"""Checkpoints of one layer as GPTQ and AWQ write them, by the layouts as they are documented."""

import json

import numpy as np
from golden import model_of

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
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (K, N))
    zeros, scales = (
        rng.integers(0, 2**bits, (K // GROUP, N)),
        rng.uniform(0.01, 0.1, (K // GROUP, N)),
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
