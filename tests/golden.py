"""Before/after checks of a pass as text, with the numbers compared in ONNX Runtime."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx_ir.passes import common

from qcompiler.ir import dialect

HEAD = '<ir_version: 10, opset_import: ["" : 21, "qcompiler" : 1]>\n'
ORT_HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\n'
Feeds = Mapping[str, NDArray[Any]]


def model_of(text: str, weights: Mapping[str, Any] | None = None, head: str = HEAD) -> ir.Model:
    """A model from ONNX text (without its head) and those of the weights that it names."""
    proto = onnx.parser.parse_model(head + text)
    for name, value in (weights or {}).items():
        if re.search(rf"\b{name}\b", text):
            tensor = ir.tensor(np.asarray(value), name=name)
            proto.graph.initializer.append(ir.serde.serialize_tensor(tensor))
    model = ir.from_proto(proto)
    common.NameFixPass()(model)
    common.ShapeInferencePass(strict_mode=False)(model)
    return model


def text_of(model: ir.Model) -> str:
    """The graph as text in which only structure counts: names in order of appearance."""
    bare = model.clone()
    common.RemoveUnusedNodesPass()(bare)
    bare.functions.clear()
    names = {value: value.name for value in [*bare.graph.inputs, *bare.graph.outputs]}
    for node in bare.graph:
        for value in [*node.inputs, *node.outputs]:
            if value is not None:
                names.setdefault(value, f"v{len(names)}")
    lines = [f"inputs {', '.join(str(v.name) for v in bare.graph.inputs)}"]
    for node in bare.graph:
        attributes = {k: str(a.value) for k, a in sorted(node.attributes.items())}
        operands = ", ".join("-" if v is None else str(names[v]) for v in node.inputs)
        results = ", ".join(str(names[v]) for v in node.outputs)
        prefix = f"{node.domain}." if node.domain else ""
        lines.append(f"{results} = {prefix}{node.op_type} {attributes or ''} ({operands})")
    lines.append(f"outputs {', '.join(str(v.name) for v in bare.graph.outputs)}")
    return "\n".join(lines)


def run(model: ir.Model, feeds: Feeds, *, plainly: bool = False) -> list[NDArray[Any]]:
    """The outputs of a model in stock ONNX Runtime, one thread.

    Args:
        model: Any stage.
        feeds: Its inputs.
        plainly: Node by node, with nothing fused; else at ONNX Runtime's default level.
    """
    copy = model.clone()
    dialect.declare(copy)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if plainly:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(copy).SerializeToString(), options)
    return session.run(None, dict(feeds))  # type: ignore[no-any-return]


def sqnr(reference: NDArray[Any], value: NDArray[Any]) -> float:
    """Signal to quantization noise ratio in dB."""
    signal = np.square(reference.astype(np.float64)).sum()
    noise = np.square(reference.astype(np.float64) - value.astype(np.float64)).sum()
    return float(10 * np.log10(signal / max(noise, 1e-300)))


def assert_rewrites(
    rewrite: ir.passes.PassBase,
    before: ir.Model,
    after: str,
    feeds: Feeds | None = None,
    *,
    exact: bool = True,
    floor_db: float = 0.0,
) -> ir.Model:
    """`rewrite(before)` prints as `after`, does nothing the second time, and keeps the numbers.

    Args:
        rewrite: The pass.
        before: Changed in place.
        after: Lines as `text_of` writes them.
        feeds: Inputs to compare outputs on.
        exact: Outputs must be equal to the last bit or two; else `floor_db` is the SQNR to keep.
        floor_db: See `exact`.
    """
    original, expected = text_of(before), None if feeds is None else run(before, feeds)
    modified = rewrite(before).modified
    printed, wanted = text_of(before), "\n".join(line.strip() for line in after.strip().split("\n"))
    assert printed == wanted, "\n".join(
        difflib.unified_diff(wanted.split("\n"), printed.split("\n"), "want", "got", lineterm="")
    )
    assert modified == (printed != original)
    assert not rewrite(before).modified, "the pass is not idempotent"
    assert text_of(before) == printed
    if feeds is not None and expected is not None:
        for got, want in zip(run(before, feeds), expected, strict=True):
            if exact:
                np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6)
            else:
                assert sqnr(want, got) >= floor_db
    return before
