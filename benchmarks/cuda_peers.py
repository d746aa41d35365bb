"""The same products by others, on the same GPU: what `cuda.py` compares its kernels with."""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["EIGHT_BIT_SIZES", "ROTATED", "W4_ROWS", "W4_SHAPES", "ort_peers", "torch_peers"]

ROTATED = 256 << 20
"""Bytes of weights that take turns: an H200 caches 60 MiB."""
W4_SHAPES = ((4096, 4096), (8192, 8192), (8192, 28672))
"""K, N."""
W4_ROWS = (1, 16, 128, 512)
EIGHT_BIT_SIZES = (4096, 8192)

Peer = dict[str, Any]
Shape = tuple[int, int, int]
"""M, K, N."""


def torch_peers() -> list[Peer]:
    """cuBLAS(Lt), and torch's own int4 product; empty where torch has no CUDA."""
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    timed = functools.partial(_torch_time, torch)
    found = []
    for k, n in W4_SHAPES:
        fp16 = _copies(2 * k * n, lambda k=k, n=n: torch.randn(
            k, n, device="cuda", dtype=torch.float16))  # fmt: skip
        for rows in W4_ROWS:
            x = torch.randn(rows, k, device="cuda", dtype=torch.float16)
            found.append(timed("cuBLAS fp16", (rows, k, n), functools.partial(_turn, x, fp16)))
        del fp16
        found += _int4_peers(torch, k, n)
    for size in EIGHT_BIT_SIZES:
        shape = (size, size, size)
        q = torch.randint(-127, 128, (size, size), device="cuda", dtype=torch.int8)
        found.append(timed("cuBLASLt int8", shape, lambda _, q=q: torch._int_mm(q, q.T)))
        half = torch.randn(size, size, device="cuda", dtype=torch.float16)
        found.append(timed("cuBLAS fp16", shape, lambda _, half=half: half @ half))
        if torch.cuda.get_device_capability() < (8, 9):
            continue
        f, one = half.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
        scaled = functools.partial(torch._scaled_mm, f, f.T, one, one, out_dtype=torch.float16)
        found.append(timed("cuBLASLt fp8", shape, lambda _, scaled=scaled: scaled()))
    return found


def _turn(x: Any, sets: list[Any], index: int) -> Any:
    return x @ sets[index % len(sets)]


def _copies(size: int, make: Callable[[], Any]) -> list[Any]:
    return [make() for _ in range(max(1, -(-ROTATED // size)))]


def _int4_peers(torch: Any, k: int, n: int) -> list[Peer]:
    """The product that torchao uses for int4 weights: bfloat16 activations, groups of 128."""
    found = []
    try:
        q = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
        packed = torch._convert_weight_to_int4pack(q, 8)
        scales = torch.rand(k // 128, n, 2, device="cuda", dtype=torch.bfloat16)
        sets = _copies(k * n // 2, packed.clone)
        for rows in W4_ROWS:
            x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)

            def call(i: int, x: Any = x) -> Any:
                return torch._weight_int4pack_mm(x, sets[i % len(sets)], 128, scales)

            found.append(_torch_time(torch, "torchao int4", (rows, k, n), call))
    except (AttributeError, RuntimeError) as error:
        found.append(_problem("torchao int4", (0, k, n), error))
    return found


def _torch_time(torch: Any, name: str, shape: Shape, call: Callable[[int], Any]) -> Peer:
    """One call of a peer, replayed as a graph of 16."""
    try:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            call(0)
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(16):
                call(i)
        times = []
        for _ in range(7):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 16 * 1e3)
    except RuntimeError as error:
        return _problem(name, shape, error)
    return _figure(name, shape, min(times[1:]))


def ort_peers() -> list[Peer]:
    """MatMulNBits in ONNX Runtime's CUDA provider; empty where that is not installed."""
    try:
        import onnxruntime as ort
    except ImportError:
        return []
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return []
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    return [_ort_time(ort, size, rows) for size, _ in W4_SHAPES[:2] for rows in W4_ROWS]


def _ort_time(ort: Any, size: int, rows: int) -> Peer:
    """One of a chain of square products, whose weights are more than a cache holds, as a graph."""
    count, shape = max(4, -(-ROTATED // (size * size // 2))), (rows, size, size)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "chain.onnx")
            _save_chain(path, size, rows, count)
            options = [("CUDAExecutionProvider", {"enable_cuda_graph": "1"})]
            session = ort.InferenceSession(str(path), providers=options)
        binding = session.io_binding()
        one = np.ones((rows, size), np.float16)
        binding.bind_ortvalue_input("x0", ort.OrtValue.ortvalue_from_numpy(one, "cuda", 0))
        binding.bind_ortvalue_output(f"x{count}", ort.OrtValue.ortvalue_from_numpy(one, "cuda", 0))
        times = []
        for _ in range(12):
            begin = time.perf_counter()
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            times.append((time.perf_counter() - begin) / count * 1e6)
    except Exception as error:  # ORT raises a dozen unrelated types
        return _problem("ORT MatMulNBits", shape, error)
    return _figure("ORT MatMulNBits", shape, min(times[4:]))


def _save_chain(path: Path, size: int, rows: int, count: int) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants = [], []
    rng = np.random.default_rng(0)
    scales = np.full((size, size // 128), 1e-3, np.float16)
    for i in range(count):
        q = rng.integers(0, 256, (size, size // 128, 64), np.uint8)
        constants.append(numpy_helper.from_array(q, f"q{i}"))
        constants.append(numpy_helper.from_array(scales, f"s{i}"))
        nodes.append(helper.make_node(
            "MatMulNBits", [f"x{i}", f"q{i}", f"s{i}"], [f"x{i + 1}"], domain="com.microsoft",
            K=size, N=size, bits=4, block_size=128,
        ))  # fmt: skip
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, [rows, size])
        for name in ("x0", f"x{count}")
    ]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location="chain.data")


def _figure(name: str, shape: Shape, microseconds: float) -> Peer:
    print(f"  {name:16} {shape} {microseconds:9.1f} us", file=sys.stderr)
    return {"peer": name, "shape": shape, "microseconds": microseconds}


def _problem(name: str, shape: Shape, error: Exception) -> Peer:
    print(f"  {name:16} {shape} {str(error)[:80]}", file=sys.stderr)
    return {"peer": name, "shape": shape, "problem": str(error)[:200]}
