"""A site as a model of its own, once for each candidate: what is timed in its place.

    float     y = MatMul(x, W)             y = Conv(x, W, b)
    ort       the function bodies of       QLinearConv(x, ..., W, ..., b)
    kernel    Quantize and QMatMulW8A8

A convolution is timed without the Q and DQ at the border of integer ops: neighbours share those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qcompiler.ir import dialect
from qcompiler.ir.region import Region
from qcompiler.ir.sites import Candidate, Site
from qcompiler.passes.canonicalize import OPSET

__all__ = ["regions_of", "site_feed", "site_model"]

_IR_VERSION = 10


def regions_of(site: Site) -> tuple[Region, Region]:
    """The kernels of a MatMul: the one that quantizes its input, and its own."""
    depth, width = site.weight
    sizes = (("K", depth), ("N", width))
    return Region("Quantize", sizes[:1]), Region("QMatMulW8A8", sizes)


def site_model(site: Site, candidate: Candidate, domain: str) -> bytes:
    """The ONNX model that computes `site` as `candidate` does.

    Args:
        site: With a weight that fits a protobuf, which ends at 2 GiB.
        candidate: "kernel" and "ort" are one model, run with or without the library.
        domain: That of the library's ops.
    """
    if site.op == "Conv":
        return _conv(site) if candidate == "float" else _qlinear_conv(site)
    return _matmul(site) if candidate == "float" else _qmatmul(site, domain)


def site_feed(site: Site, candidate: Candidate, shape: tuple[int, ...]) -> dict[str, NDArray[Any]]:
    """Values for the input `x` of a site's model."""
    integers = site.op == "Conv" and candidate != "float"
    return {"x": _pattern(shape, np.uint8) if integers else _activations(shape)}


def _matmul(site: Site) -> bytes:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return _save([node], TensorProto.FLOAT, ["m", site.weight[0]],
                 {"w": _pattern(site.weight, np.float32)})  # fmt: skip


def _qmatmul(site: Site, domain: str) -> bytes:
    quantize, product = regions_of(site)
    functions = [dialect.region_function(region, domain, OPSET) for region in (quantize, product)]
    nodes = [
        helper.make_node(quantize.name, ["x"], ["q", "s"], domain=domain),
        helper.make_node(product.name, ["q", "s", "w", "ws"], ["y"], domain=domain),
    ]
    width = site.weight[1]
    constants = {"w": _pattern(site.weight, np.int8), "ws": np.full(width, 0.01, np.float32)}
    return _save(nodes, TensorProto.FLOAT, ["m", site.weight[0]], constants, domain, functions)


def _conv(site: Site) -> bytes:
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], **_conv_attributes(site))
    constants = {
        "w": _pattern(site.weight, np.float32),
        "b": np.zeros(site.weight[0], np.float32),
    }
    return _save([node], TensorProto.FLOAT, _data_shape(site), constants)


def _qlinear_conv(site: Site) -> bytes:
    channels = site.weight[0]
    constants: dict[str, NDArray[Any]] = {
        "scale": np.asarray(0.05, np.float32),
        "zero": np.asarray(128, np.uint8),
        "w": _pattern(site.weight, np.int8),
        "ws": np.full(channels, 0.01, np.float32),
        "wz": np.zeros(channels, np.int8),
        "b": np.zeros(channels, np.int32),
    }
    inputs = ["x", "scale", "zero", "w", "ws", "wz", "scale", "zero", "b"]
    node = helper.make_node("QLinearConv", inputs, ["y"], **_conv_attributes(site))
    return _save([node], TensorProto.UINT8, _data_shape(site), constants)


def _conv_attributes(site: Site) -> dict[str, Any]:
    attributes: dict[str, Any] = {name: list(numbers) for name, numbers in site.attributes}
    return attributes | {"group": site.attribute("group")[0]}


def _data_shape(site: Site) -> list[Any]:
    channels = site.weight[1] * site.attribute("group")[0]
    return ["n", channels, *(f"d{axis}" for axis in range(len(site.weight) - 2))]


def _pattern(shape: tuple[int, ...], dtype: type) -> NDArray[Any]:
    """Small numbers that repeat; integer and float products take as long for any others."""
    few: NDArray[Any] = np.random.default_rng(0).integers(1, 100, 997).astype(dtype)
    if dtype is np.float32:
        few /= 100
    return np.resize(few, shape)


def _activations(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Floats that repeat, spread like those between layers.

    With AVX2 alone it takes longer to multiply many that are large and of one sign
    (native/split_rows.c).
    """
    return np.resize(np.random.default_rng(0).standard_normal(997).astype(np.float32), shape)


def _save(
    nodes: Sequence[onnx.NodeProto],
    dtype: int,
    shape: list[Any],
    constants: dict[str, NDArray[Any]],
    domain: str = "",
    functions: Sequence[ir.Function] = (),
) -> bytes:
    graph = helper.make_graph(
        list(nodes),
        "site",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info("y", dtype, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    domains = [helper.make_opsetid("", OPSET)]
    domains += [helper.make_opsetid(domain, dialect.VERSION)] if domain else []
    model = helper.make_model(
        graph,
        opset_imports=domains,
        ir_version=_IR_VERSION,
        functions=[ir.to_proto(function) for function in functions],
    )
    return bytes(model.SerializeToString())
