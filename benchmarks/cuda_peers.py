"""The same products by others, on the same GPU: what `cuda.py` compares its kernels with.

Each is a task of its own: a peer that fails, or breaks the GPU for its process, takes no other's
figures along.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from cuda_clock import settled
from cuda_tasks import Task, breaks_the_gpu

__all__ = ["EIGHT_BIT_SIZES", "ROTATED", "W4_ROWS", "W4_SHAPES", "peer_tasks"]

ROTATED = 256 << 20
"""Bytes of weights that take turns: an H200 caches 60 MiB."""
W4_SHAPES = ((4096, 4096), (8192, 8192), (8192, 28672))
"""K, N."""
W4_ROWS = (1, 16, 128, 512)
EIGHT_BIT_SIZES = (4096, 8192)
_REPLAYED = 16
"""Calls in a graph of torch's."""
_CHAINED = 256
"""Products in a model for ONNX Runtime: to call its session takes as long as some of them."""

Peer = dict[str, Any]
Shape = tuple[int, int, int]
"""M, K, N."""


class MissingError(Exception):
    """A peer that is not installed; the message says what."""


def peer_tasks() -> list[Task]:
    """All of them, by the figures that ours are judged by."""
    found: list[Task] = []
    for k, n in W4_SHAPES:
        found.append(_task("cuBLAS fp16", _half_peers, k, n))
    for size in EIGHT_BIT_SIZES:
        for name, run in (("int8", _int8_peer), ("fp8", _fp8_peers), ("fp16", _square_peer)):
            found.append(_task(f"cuBLASLt {name}", run, size))
    for k, n in W4_SHAPES:
        found.append(_task("torch int4", _int4_peers, k, n))
    for size, _ in W4_SHAPES[:2]:
        for rows in W4_ROWS:
            found.append(_task("ORT MatMulNBits", _ort_peer, size, rows))
    return found


def _task(name: str, run: Callable[..., list[Peer]], *sizes: int) -> Task:
    """One that is not installed is no failure."""

    def tried() -> list[Peer]:
        try:
            return run(*sizes)
        except MissingError as missing:
            print(f"  {name:16} {sizes} {missing}", file=sys.stderr)
            return [{"peer": name, "problem": str(missing)}]

    return f"{name} {' x '.join(map(str, sizes))}", tried


# --- torch ------------------------------------------------------------------------------------


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingError(f"no torch ({error})") from error
    if not torch.cuda.is_available():
        raise MissingError(f"torch {torch.__version__} has no CUDA here")
    return torch


def _half_peers(k: int, n: int) -> list[Peer]:
    torch = _torch()
    make = functools.partial(torch.randn, k, n, device="cuda", dtype=torch.float16)
    sets, found = _copies(2 * k * n, make), []
    for rows in W4_ROWS:
        x = torch.randn(rows, k, device="cuda", dtype=torch.float16)
        call = functools.partial(_turn, x, sets)
        found.append(_torch_time(torch, "cuBLAS fp16", (rows, k, n), call))
    return found


def _turn(x: Any, sets: list[Any], index: int) -> Any:
    return x @ sets[index % len(sets)]


def _copies(size: int, make: Callable[[], Any]) -> list[Any]:
    return [make() for _ in range(max(1, -(-ROTATED // size)))]


def _int8_peer(size: int) -> list[Peer]:
    torch = _torch()
    q = torch.randint(-127, 128, (size, size), device="cuda", dtype=torch.int8)
    return [_torch_time(torch, "cuBLASLt int8", (size,) * 3, lambda _: torch._int_mm(q, q.T))]


def _square_peer(size: int) -> list[Peer]:
    torch = _torch()
    half = torch.randn(size, size, device="cuda", dtype=torch.float16)
    return [_torch_time(torch, "cuBLAS fp16", (size,) * 3, lambda _: half @ half)]


def _fp8_peers(size: int) -> list[Peer]:
    """With sums of some added up in float32, as ours are, and as tensor cores alone have them."""
    torch = _torch()
    if torch.cuda.get_device_capability() < (8, 9):
        raise MissingError("this GPU multiplies no float8")
    f = torch.randn(size, size, device="cuda").to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    found = []
    for name, is_fast in (("cuBLASLt fp8", False), ("cuBLASLt fp8 fast", True)):

        def call(_: int, is_fast: bool = is_fast) -> Any:
            return torch._scaled_mm(
                f, f.T, scale_a=one, scale_b=one, out_dtype=torch.float16, use_fast_accum=is_fast
            )

        found.append(_torch_time(torch, name, (size,) * 3, call))
    return found


def _int4_peers(k: int, n: int) -> list[Peer]:
    """The product that torchao uses for int4 weights: bfloat16 activations, groups of 128."""
    torch = _torch()
    q = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
    packed = torch._convert_weight_to_int4pack(q, 8)
    scales = torch.rand(k // 128, n, 2, device="cuda", dtype=torch.bfloat16)
    sets, found = _copies(k * n // 2, packed.clone), []
    for rows in W4_ROWS:
        x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)

        def call(i: int, x: Any = x) -> Any:
            return torch._weight_int4pack_mm(x, sets[i % len(sets)], 128, scales)

        found.append(_torch_time(torch, "torchao int4", (rows, k, n), call))
    return found


def _torch_time(torch: Any, name: str, shape: Shape, call: Callable[[int], Any]) -> Peer:
    """One call of a peer, replayed as a graph."""
    try:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            call(0)
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(_REPLAYED):
                call(i)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def replay() -> float:
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            return float(begin.elapsed_time(end)) / 1e3

        return _figure(name, shape, settled(replay) / _REPLAYED * 1e6)
    except (RuntimeError, TypeError, AttributeError) as error:
        if breaks_the_gpu(error):
            raise
        return _problem(name, shape, error)


# --- ONNX Runtime -----------------------------------------------------------------------------


def _ort_peer(size: int, rows: int) -> list[Peer]:
    """MatMulNBits in its CUDA provider."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingError(f"no onnxruntime ({error})") from error
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise MissingError(f"onnxruntime {ort.__version__} has no CUDAExecutionProvider")
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    return [_ort_time(ort, size, rows)]


def _ort_time(ort: Any, size: int, rows: int) -> Peer:
    """One of a chain of square products, whose weights are more than a cache holds, as a graph."""
    shape = (rows, size, size)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "chain.onnx")
            _save_chain(path, size, rows, max(4, -(-ROTATED // (size * size // 2))))
            options = [("CUDAExecutionProvider", {"enable_cuda_graph": "1"})]
            session = ort.InferenceSession(str(path), providers=options)
        if "CUDAExecutionProvider" not in session.get_providers():
            raise RuntimeError("ONNX Runtime could not make its CUDAExecutionProvider")
        binding = session.io_binding()
        x = np.random.default_rng(0).standard_normal((rows, size)).astype(np.float16)
        first, last = (ort.OrtValue.ortvalue_from_numpy(x, "cuda", 0) for _ in range(2))
        binding.bind_ortvalue_input("x0", first)
        binding.bind_ortvalue_output(f"x{_CHAINED}", last)

        def replay() -> float:
            begin = time.perf_counter()
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            return time.perf_counter() - begin

        return _figure("ORT MatMulNBits", shape, settled(replay) / _CHAINED * 1e6)
    except Exception as error:  # ORT raises a dozen unrelated types
        return _problem("ORT MatMulNBits", shape, error)


def _save_chain(path: Path, size: int, rows: int, sets: int) -> None:
    """Products one after the other, each with the next of the `sets` of weights."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    # Of integers up to 8: results neither grow nor vanish.
    scales = np.full((size, size // 128), 1 / (4.6 * size**0.5), np.float16)
    constants = [numpy_helper.from_array(scales, "s")]
    for i in range(sets):
        q = rng.integers(0, 256, (size, size // 128, 64), np.uint8)
        constants.append(numpy_helper.from_array(q, f"q{i}"))
    nodes = [
        helper.make_node(
            "MatMulNBits", [f"x{i}", f"q{i % sets}", "s"], [f"x{i + 1}"], domain="com.microsoft",
            K=size, N=size, bits=4, block_size=128,
        )
        for i in range(_CHAINED)
    ]  # fmt: skip
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, [rows, size])
        for name in ("x0", f"x{_CHAINED}")
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
