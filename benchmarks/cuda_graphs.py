"""Whole models for `cuda_models.py`, made on the spot: real sizes, weights of random numbers.

A machine that is lent has no network: what a run takes does not depend on what weights are.  They
are one block of random numbers over and over, so that 1.9 GB of prepared models pack into a few MB.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import onnx.parser
from numpy.typing import NDArray
from onnx import numpy_helper

__all__ = ["MINILM", "SMOLLM2", "Sizes", "decoder", "encoder"]

Array = NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a transformer.

    Attributes:
        name: What reports call it.
        layers: How many.
        width: Of a token.
        heads: Of queries.
        shared: Heads of keys and values.
        inner: Width between the two products behind attention.
        words: Length of the table of words.
    """

    name: str
    layers: int
    width: int
    heads: int
    shared: int
    inner: int
    words: int

    @property
    def depth(self) -> int:
        """Of a head."""
        return self.width // self.heads


MINILM = Sizes("MiniLM-L6", 6, 384, 12, 12, 1536, 30522)
SMOLLM2 = Sizes("SmolLM2-135M", 30, 576, 9, 3, 1536, 49152)


_BLOCK = 128
"""Rows that repeat: as many as share a scale of 4 bits."""


class _Model:
    """Lines of ONNX text, and weights."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes, self._lines = sizes, list[str]()
        widest = max(sizes.width, sizes.inner)
        self._block = np.random.default_rng(0).standard_normal((_BLOCK, widest), np.float32)
        self._weights: dict[str, Array] = {}

    def line(self, text: str, **names: object) -> None:
        self._lines.append(text.format(**names))

    def constant(self, name: str, array: Array) -> str:
        self._weights[name] = array
        return name

    def weight(self, name: str, rows: int, columns: int) -> str:
        block, widest = self._block / rows**0.5, self._block.shape[1]
        scaled = np.tile(block, (-(-rows // _BLOCK), -(-columns // widest)))
        return self.constant(name, np.ascontiguousarray(scaled[:rows, :columns]))

    def product(self, result: str, x: str, rows: int, columns: int, bias: bool = False) -> str:
        w = self.weight(f"w_{result}", rows, columns)
        self.line(f"{result}{'_0' if bias else ''} = MatMul({x}, {w})")
        if bias:
            b = self.constant(f"b_{result}", np.zeros(columns, np.float32))
            self.line(f"{result} = Add({result}_0, {b})")
        return result

    def finish(self, inputs: str, outputs: str) -> onnx.ModelProto:
        head = '<ir_version: 10, opset_import: ["" : 21]>\n'
        body = "\n".join(self._lines)
        model = onnx.parser.parse_model(f"{head}g ({inputs}) => ({outputs}) {{\n{body}\n}}")
        model.graph.initializer.extend(
            numpy_helper.from_array(array, name) for name, array in self._weights.items()
        )
        for index, node in enumerate(model.graph.node):
            node.name = f"{node.op_type}_{index}"
        return model


def _shape(model: _Model, name: str, *sizes: int) -> str:
    return model.constant(name, np.asarray(sizes))


def encoder(sizes: Sizes) -> onnx.ModelProto:
    """Tokens [batch, tokens] to vectors, as BERT: the norm after each half of a layer."""
    m, width = _Model(sizes), sizes.width
    heads = _shape(m, "heads", 0, 0, sizes.heads, sizes.depth)
    joined = _shape(m, "joined", 0, 0, width)
    scale = m.constant("scale", np.float32(sizes.depth**-0.5))
    ones = m.constant("ones", np.ones(width, np.float32))
    zeros = m.constant("zeros", np.zeros(width, np.float32))
    m.line(f"h0 = Gather({m.weight('words', sizes.words, width)}, ids)")
    for i in range(sizes.layers):
        for part, order in (("q", "0, 2, 1, 3"), ("k", "0, 2, 3, 1"), ("v", "0, 2, 1, 3")):
            m.product(f"{part}{i}", f"h{i}", width, width, bias=True)
            m.line(f"{part}r{i} = Reshape({part}{i}, {heads})")
            m.line(f"{part}t{i} = Transpose <perm = [{order}]> ({part}r{i})")
        m.line(f"a{i} = MatMul(qt{i}, kt{i})\n s{i} = Mul(a{i}, {scale})\n p{i} = Softmax(s{i})")
        m.line(f"c{i} = MatMul(p{i}, vt{i})\n ct{i} = Transpose <perm = [0, 2, 1, 3]> (c{i})")
        m.line(f"cj{i} = Reshape(ct{i}, {joined})")
        m.product(f"o{i}", f"cj{i}", width, width, bias=True)
        m.line(f"r{i} = Add(o{i}, h{i})\n n{i} = LayerNormalization(r{i}, {ones}, {zeros})")
        m.product(f"u{i}", f"n{i}", width, sizes.inner, bias=True)
        m.line(f"g{i} = Gelu(u{i})")
        m.product(f"d{i}", f"g{i}", sizes.inner, width, bias=True)
        m.line(f"e{i} = Add(d{i}, n{i})\n h{i + 1} = LayerNormalization(e{i}, {ones}, {zeros})")
    m.line(f"y = Identity(h{sizes.layers})")
    return m.finish("int64[batch, tokens] ids", f"float[batch, tokens, {width}] y")


def decoder(sizes: Sizes) -> onnx.ModelProto:
    """One token and what is remembered of those before it to the scores of the next, as Llama."""
    m, depth = _Model(sizes), sizes.depth
    for name, value in (("two", 2), ("epsilon", 1e-5), ("scale", depth**-0.5)):
        m.constant(name, np.float32(value))
    m.constant("last", np.asarray([-1]))
    m.constant("ones", np.ones(sizes.width, np.float32))
    _shape(m, "groups", 1, 1, sizes.heads // sizes.shared, 1, 1)
    _shape(m, "repeated", 0, sizes.heads, -1, depth)
    _shape(m, "third", 2)
    _shape(m, "joined", 0, -1, sizes.width)
    m.line(f"h0 = Gather({m.weight('words', sizes.words, sizes.width)}, ids)")
    for i in range(sizes.layers):
        _attend(m, i, sizes)
        _gate(m, i, sizes)
    _rms_norm(m, "end", f"h{sizes.layers}")
    m.product("y", "end", sizes.width, sizes.words)
    kept = [f"{part}{i}" for i in range(sizes.layers) for part in "kv"]
    place = f"float[1, 1, 1, {depth}]"
    inputs = ["int64[1, 1] ids", f"{place} cos", f"{place} sin"]
    inputs += [f"float[1, {sizes.shared}, past, {depth}] past_{name}" for name in kept]
    outputs = [f"float[1, 1, {sizes.words}] y"]
    outputs += [f"float[1, {sizes.shared}, total, {depth}] present_{name}" for name in kept]
    return m.finish(", ".join(inputs), ", ".join(outputs))


def _attend(m: _Model, i: int, sizes: Sizes) -> None:
    """The first half of a decoder's layer; heads of keys and values are repeated."""
    _rms_norm(m, f"n{i}", f"h{i}")
    for part, count in (("q", sizes.heads), ("k", sizes.shared), ("v", sizes.shared)):
        m.product(f"{part}{i}", f"n{i}", sizes.width, count * sizes.depth)
        split = _shape(m, f"{part}_heads", 0, 0, count, sizes.depth)
        m.line(f"{part}r{i} = Reshape({part}{i}, {split})")
        m.line(f"{part}t{i} = Transpose <perm = [0, 2, 1, 3]> ({part}r{i})")
    for part in ("q", "k"):
        _rotate(m, f"{part}p{i}", f"{part}t{i}")
    for part, new in (("k", f"kp{i}"), ("v", f"vt{i}")):
        m.line(f"present_{part}{i} = Concat <axis = 2> (past_{part}{i}, {new})")
        m.line(f"{part}u{i} = Unsqueeze(present_{part}{i}, third)")
        m.line(f"{part}x{i} = Expand({part}u{i}, groups)")
        m.line(f"{part}a{i} = Reshape({part}x{i}, repeated)")
    m.line(f"kc{i} = Transpose <perm = [0, 1, 3, 2]> (ka{i})\n a{i} = MatMul(qp{i}, kc{i})")
    m.line(f"s{i} = Mul(a{i}, scale)\n p{i} = Softmax(s{i})\n c{i} = MatMul(p{i}, va{i})")
    m.line(f"ct{i} = Transpose <perm = [0, 2, 1, 3]> (c{i})\n cj{i} = Reshape(ct{i}, joined)")
    m.product(f"o{i}", f"cj{i}", sizes.width, sizes.width)
    m.line(f"r{i} = Add(o{i}, h{i})")


def _gate(m: _Model, i: int, sizes: Sizes) -> None:
    """The second half."""
    _rms_norm(m, f"m{i}", f"r{i}")
    m.product(f"gate{i}", f"m{i}", sizes.width, sizes.inner)
    m.product(f"up{i}", f"m{i}", sizes.width, sizes.inner)
    m.line(f"z{i} = Sigmoid(gate{i})\n silu{i} = Mul(gate{i}, z{i})")
    m.line(f"f{i} = Mul(silu{i}, up{i})")
    m.product(f"down{i}", f"f{i}", sizes.inner, sizes.width)
    m.line(f"h{i + 1} = Add(down{i}, r{i})")


def _rms_norm(m: _Model, result: str, x: str) -> None:
    m.line(f"{result}_s = Pow({x}, two)\n {result}_m = ReduceMean({result}_s, last)")
    m.line(f"{result}_e = Add({result}_m, epsilon)\n {result}_r = Sqrt({result}_e)")
    m.line(f"{result}_u = Div({x}, {result}_r)\n {result} = Mul({result}_u, ones)")


def _rotate(m: _Model, result: str, x: str) -> None:
    """The pairs of a head by the angles of the token's place."""
    m.line(f"{result}_a, {result}_b = Split <axis = -1, num_outputs = 2> ({x})")
    m.line(
        f"{result}_n = Neg({result}_b)\n {result}_c = Concat <axis = -1> ({result}_n, {result}_a)"
    )
    m.line(f"{result}_p = Mul({x}, cos)\n {result}_q = Mul({result}_c, sin)")
    m.line(f"{result} = Add({result}_p, {result}_q)")
