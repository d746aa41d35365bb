"""The custom-op library in ONNX Runtime: registered or not, right, robust, also from C."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path
from typing import Any

import c_host
import numpy as np
import onnx
import pytest
from feed_forward import (
    DOMAIN,
    FEED_FORWARD,
    QUANTIZE_K,
    REGIONS,
    UP,
    F,
    K,
    N,
    feed_forward,
    make_constants,
    model,
    node,
    session,
)
from instruction_sets import each_isa, needs_kernels
from onnx import TensorProto, helper, numpy_helper
from raw_kernels import Array, quantize
from registry import debian_package

from qcompiler.cli.host import instruction_sets
from qcompiler.targets.cache import KernelCache
from qcompiler.targets.library import Library, build_library
from qcompiler.targets.x86 import ISAS, Isa


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    folder = tmp_path_factory.mktemp("library")
    return build_library(REGIONS, DOMAIN, folder / "lib.so", cache=KernelCache(folder / "cache"))


@pytest.fixture(scope="module")
def constants() -> dict[str, Array]:
    return make_constants()


@each_isa("QMatMulW8A8")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_chain_of_ops(
    isa: Isa, threads: int, library: Library, constants: dict[str, Array]
) -> None:
    outputs = {"y": TensorProto.FLOAT, "q": TensorProto.UINT8, "s": TensorProto.FLOAT}
    run = session(model(FEED_FORWARD, outputs, constants), library, threads, isa)
    assert [o.shape for o in run.get_outputs()] == [
        ["batch", "tokens", N], ["batch", "tokens", K], ["batch", "tokens", 1],
    ]  # fmt: skip
    for leading in [(1, 1), (1, 2), (3, 5), (2, 0), (0, 4), (2, 400), (5, 1000)]:
        x = np.random.default_rng(1).standard_normal((*leading, K)).astype(np.float32)
        y, q, s = run.run(None, {"x": x})
        expected_q, expected_s = quantize(x) if x.size else (q, s)
        np.testing.assert_array_equal(q, expected_q)
        np.testing.assert_array_equal(s, expected_s)
        assert y.shape == (*leading, N)
        if x.size:
            # A tie of the second quantization may fall either way: one step of it at most.
            np.testing.assert_allclose(y, feed_forward(x, constants), atol=0.2)
            assert np.abs(y - feed_forward(x, constants)).mean() < 1e-3


@needs_kernels
def test_open_dimensions_without_names(library: Library, constants: dict[str, Array]) -> None:
    """What reads the shape of a result must not see -1: ORT folds shapes as it optimizes."""
    nodes = [*FEED_FORWARD, helper.make_node("Shape", ["y"], ["shape"])]
    inputs: dict[str, tuple[int, list[Any]]] = {"x": (TensorProto.FLOAT, [None, None, K])}
    outputs = {"y": TensorProto.FLOAT, "shape": TensorProto.INT64}
    run = session(model(nodes, outputs, constants, inputs), library)
    assert run.run(["shape"], {"x": np.ones((2, 3, K), np.float32)})[0].tolist() == [2, 3, N]


@needs_kernels
def test_sessions_and_threads_share_the_library(
    library: Library, constants: dict[str, Array]
) -> None:
    proto = model(FEED_FORWARD, {"y": TensorProto.FLOAT}, constants)
    sessions = [session(proto, library, threads=2) for _ in range(2)]
    x = np.random.default_rng(2).standard_normal((8, 1, 120, K)).astype(np.float32)
    expected = [sessions[0].run(None, {"x": part})[0] for part in x]
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 8, 60):
            y = sessions[seed % 2].run(None, {"x": x[i]})[0]
            if not np.array_equal(y, expected[i]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def with_body(outputs: dict[str, int]) -> onnx.ModelProto:
    """Quantize whose function body returns the constants 7 and 9."""
    proto = model([node(QUANTIZE_K, ["x"], ["q", "s"])], outputs, {})
    seven = numpy_helper.from_array(np.array([7], np.uint8))
    nine = numpy_helper.from_array(np.array([9], np.float32))
    body = [
        helper.make_node("Constant", [], ["q"], value=seven),
        helper.make_node("Constant", [], ["s"], value=nine),
    ]
    function = helper.make_function(
        DOMAIN, QUANTIZE_K.name, ["x"], ["q", "s"], body, [helper.make_opsetid("", 20)]
    )
    proto.functions.append(function)
    return proto


@pytest.mark.parametrize("isa", ["none", "avx512-bf16", *(isa.name for isa in ISAS)])
def test_isa_override(isa: str, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantize has no kernel for AVX-VNNI or AVX512-BF16: one that those include must run."""
    words = Path("/proc/cpuinfo").read_text().split()
    has = isa in instruction_sets() or (isa == "avx512-bf16" and "avx512_bf16" in words)
    runs = "kernel" if has else "body"
    monkeypatch.setenv("QCOMPILER_ISA", isa)
    proto = with_body({"q": TensorProto.UINT8, "s": TensorProto.FLOAT})
    q, s = session(proto, library).run(None, {"x": np.ones((1, 1, K), np.float32)})
    expected = ([7], [9]) if runs == "body" else ([255] * K, [1 / 127])
    np.testing.assert_array_equal(q.ravel(), expected[0])
    np.testing.assert_allclose(s.ravel(), expected[1])


def test_unknown_isa_is_an_error(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILER_ISA", "avx513")
    with pytest.raises(
        Exception, match=r"avx513 is no instruction set.*none, avx512-bf16, avx512-vnni, avx-vnni"
    ):
        session(with_body({"q": TensorProto.UINT8}), library)


@needs_kernels
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": (3, K + 1)}, r"input q has shape \[3, 71\]; its last dimension must be 70"),
        ({"s": (2, 1)}, r"input s has shape \[2, 1\]; it must hold 3 values"),
        ({"b": (F + 1,)}, r"input 4 has shape \[131\]; it must hold 130 values"),
    ],
)
def test_wrong_shapes_are_errors(
    changed: dict[str, tuple[int, ...]],
    message: str,
    library: Library,
    constants: dict[str, Array],
) -> None:
    shapes: dict[str, tuple[int, ...]] = {"q": (3, K), "s": (3, 1), "b": (F,)} | changed
    inputs: dict[str, tuple[int, list[Any]]] = {
        "q": (TensorProto.UINT8, [None, None]),
        "s": (TensorProto.FLOAT, [None, None]),
        "b": (TensorProto.FLOAT, [None]),
    }
    proto = model(
        [node(UP, ["q", "s", "w1", "ws1", "b"], ["y"])],
        {"y": TensorProto.FLOAT},
        {name: constants[name] for name in ("w1", "ws1")},
        inputs,
    )
    feeds = {
        name: np.ones(shape, np.uint8 if name == "q" else np.float32)
        for name, shape in shapes.items()
    }
    with pytest.raises(Exception, match=UP.name + ": " + message):
        session(proto, library).run(None, feeds)


@needs_kernels
def test_an_operand_need_not_be_an_initializer(
    library: Library, constants: dict[str, Array]
) -> None:
    """One with a default is none to ONNX Runtime, and each run asks for it."""
    proto = model(FEED_FORWARD, {"y": TensorProto.FLOAT}, constants)
    expected_of = session(proto, library)
    for name in ("b1", "b2"):
        shape = constants[name].shape
        proto.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    x = np.random.default_rng(3).standard_normal((1, 3, K)).astype(np.float32)
    for b1 in (constants["b1"], constants["b1"] + 1):
        (y,) = session(proto, library).run(None, {"x": x, "b1": b1})
        (expected,) = expected_of.run(None, {"x": x})
        assert np.array_equal(y, expected) == (b1 is constants["b1"])


@needs_kernels
def test_an_initializer_of_another_shape(library: Library, constants: dict[str, Array]) -> None:
    wrong = model(FEED_FORWARD, {"y": TensorProto.FLOAT}, {**constants, "b1": constants["b2"]})
    message = UP.name + r": input 4 has shape \[70\]; it must hold 130 values"
    with pytest.raises(Exception, match=message):
        session(wrong, library)


@needs_kernels
def test_weights_must_be_initializers_of_the_right_shape(
    library: Library, constants: dict[str, Array]
) -> None:
    up = [node(QUANTIZE_K, ["x"], ["q", "s"]), node(UP, ["q", "s", "w1", "ws1", "b1"], ["y"])]
    wrong = {**constants, "w1": constants["w1"].T}
    with pytest.raises(Exception, match=r"w has shape \[130, 70\]; it must be \[70, 130\]"):
        session(model(up, {"y": TensorProto.FLOAT}, wrong), library)
    inputs: dict[str, tuple[int, list[Any]]] = {
        "x": (TensorProto.FLOAT, [1, K]),
        "w1": (TensorProto.INT8, [K, F]),
    }
    others = {name: array for name, array in constants.items() if name != "w1"}
    with pytest.raises(Exception, match="w must be an initializer"):
        session(model(up, {"y": TensorProto.FLOAT}, others, inputs), library)


def test_an_old_onnxruntime_gets_a_real_error(library: Library) -> None:
    """`GetApi` of our version is NULL; version 1 is there to say so with."""
    messages: list[str] = []

    def note(_: int, message: bytes) -> int:
        messages.append(message.decode())
        return 1

    create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(note)
    table = (ctypes.c_void_p * 1)(ctypes.cast(create, ctypes.c_void_p))
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(
        lambda version: ctypes.addressof(table) if version == 1 else None
    )
    version = ctypes.create_string_buffer(b"1.16.3")
    get_version = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(version))
    base = (ctypes.c_void_p * 2)(
        ctypes.cast(get_api, ctypes.c_void_p), ctypes.cast(get_version, ctypes.c_void_p)
    )
    register = ctypes.CDLL(str(library.path)).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, base) == 1
    assert messages == [
        f"{DOMAIN} needs ONNX Runtime 1.22 or newer, this is 1.16.3: pip install -U onnxruntime"
    ]


def official_header() -> Path:
    """The folder of ONNX Runtime's own header: named, installed, or out of Debian's package."""
    folders = [os.environ.get("QCOMPILER_ORT_INCLUDE", ""), "/usr/include/onnxruntime"]
    for folder in filter(None, folders):
        if Path(folder, "onnxruntime_c_api.h").exists():
            return Path(folder)
    return debian_package("libonnxruntime-dev") / "usr" / "include" / "onnxruntime"


def test_our_header_agrees_with_the_official_one(tmp_path: Path) -> None:
    c_host.compile_program(
        c_host.NATIVE / "abi_check.c", tmp_path / "check.o", "-c", f"-I{official_header()}"
    )


@needs_kernels
@pytest.mark.parametrize("version", c_host.VERSIONS)
def test_an_application_in_c(
    library: Library, constants: dict[str, Array], tmp_path: Path, version: str
) -> None:
    inputs: dict[str, tuple[int, list[Any]]] = {"x": (TensorProto.FLOAT, ["tokens", K])}
    proto = model(FEED_FORWARD, {"y": TensorProto.FLOAT}, constants, inputs)
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    x = np.random.default_rng(4).standard_normal((9, K)).astype(np.float32)
    y = c_host.run(version, library.path, tmp_path / "model.onnx", x, N, tmp_path)
    (expected,) = session(proto, library).run(None, {"x": x})
    np.testing.assert_array_equal(y, expected)
