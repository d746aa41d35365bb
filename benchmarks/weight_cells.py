"""One figure of the table of 4-bit weights: a model rounded in one way, ours or a peer's."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
from llama_cpp import bits_of, rounded
from weight_cases import Case
from weight_kinds import bits_of_kind, type_of
from weight_peers import Write, of_onnxruntime, of_onnxsim, of_onnxsim_in_groups, stored_bits

from qcompiler.frontend import load_model
from qcompiler.ir.decisions import NodePlan, plan_of, set_plan
from qcompiler.ir.graph import constant, new_initializer
from qcompiler.passes.awq import AWQ
from qcompiler.passes.gptq import GPTQ
from qcompiler.passes.hqq import HQQ
from qcompiler.passes.round_to_nearest import RoundToNearest
from qcompiler.passes.second_moments import LayerRuns
from qcompiler.passes.widen_constants import dequantized_constant
from qcompiler.pipeline import Pipeline
from qcompiler.recipe import Recipe
from qcompiler.samples import Samples
from qcompiler.walk import walker

Score = Callable[[Path], dict[str, float]]

_CHANNEL = 2048
"""Per channel is one block longer than any column; ONNX Runtime's must be powers of two."""


def measure(case: Case, group: int, name: str) -> dict[str, Any]:
    """The figures of one contender.

    Args:
        case: The model.
        group: Weights per scale; 0 for one scale per channel.
        name: "float", a peer, or a way of rounding and a kind of groups: "gptq, int4".
    """
    if name == "float":
        return dict(case.score(case.source))
    if name.startswith(("ORT", "onnxsim")):
        write = _writer(case, name)
        return measure_peer(write, case.source, group or _CHANNEL, case.score)
    model = planned(case.source, case.head)
    if name.startswith("llama.cpp "):
        return measure_llama_cpp(model, name.removeprefix("llama.cpp "), case.score)
    (rounding,) = [way for way in ROUNDINGS if name.startswith(f"{way}, ")]
    runs = LayerRuns(walker(Samples(lambda: iter(case.calibration))))
    kind = name.removeprefix(f"{rounding}, ")
    return measure_ours(model, group, kind, rounding, runs, case.score)


def _writer(case: Case, name: str) -> Write:
    """What writes the file of a peer."""
    for of_package in (of_onnxruntime, of_onnxsim, of_onnxsim_in_groups):
        if name.startswith("ORT") == (of_package is of_onnxruntime):
            writers = of_package(case.calibration, case.head)
            if name in writers:
                return writers[name]
    raise SystemExit(f"no peer is called {name!r}")


def planned(source: Path, head: str) -> ir.Model:
    """The model with its layers planned, float activations."""
    recipe = Recipe(keep_float=(head,) if head else ())
    pipeline = Pipeline.default("cuda-int4", recipe)
    names = [step.name for step in pipeline]
    for name in names[names.index("assign-precision") + 1 :]:
        pipeline.remove(name)
    return pipeline.run(load_model(source))


def with_type(model: ir.Model, group: int, kind: str, rounding: str) -> ir.Model:
    """A copy whose layers are to be stored, and rounded, so."""
    copy = model.clone()
    for old, new in zip(model.graph, copy.graph, strict=True):
        if plan_of(old) is not None:
            type = type_of(group, kind, _shape(new)[0])
            set_plan(new, NodePlan(type, None, rounding=rounding.split(",")[0]))
    return copy


def _shape(product: ir.Node) -> tuple[int, int]:
    weight = product.inputs[1]
    assert weight is not None and weight.const_value is not None
    depth, width = weight.const_value.shape.numpy()
    return depth, width


def save_floats(model: ir.Model, path: Path) -> None:
    """Write the model with its rounded weights as floats: how ORT computes does not matter then."""
    for node in list(model.graph):
        if node.op_type == "DequantizeLinear":
            floats = dequantized_constant(node.outputs[0])
            if floats is None:
                continue  # offsets of 8 bits, which are looked up as they are stored
            value = new_initializer(model.graph, f"{node.name}_float", floats)
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
            model.graph.remove(node, safe=True)
    for value in list(model.graph.initializers.values()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[value.name or ""]
    ir.save(model, path, external_data=f"{path.name}.data")


ROUNDINGS = ("nearest, max", "nearest, mse", "hqq", "awq", "gptq", "awq_gptq")
"""Ours: to nearest by two kinds of scales, and by the passes of that name."""


def round_weights(model: ir.Model, rounding: str, runs: LayerRuns) -> None:
    """Round all planned layers."""
    scale = "max" if rounding.endswith("max") else "mse"
    for rewrite in (AWQ(runs), HQQ(runs), GPTQ(runs),
                    RoundToNearest(RoundToNearest.Options(scale=scale))):  # fmt: skip
        rewrite(model)


def measure_ours(
    model: ir.Model,
    group: int,
    kind: str,
    rounding: str,
    runs: LayerRuns,
    score: Score,
) -> dict[str, Any]:
    """Scores, and what rounding took."""
    copy = with_type(model, group, kind, rounding)
    shapes = [_shape(node) for node in model.graph if plan_of(node) is not None]
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    round_weights(copy, rounding, runs)
    after = resource.getrusage(resource.RUSAGE_SELF)
    took = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_mib": after.ru_maxrss / 1024,
    }
    with tempfile.TemporaryDirectory() as folder:
        save_floats(copy, Path(folder) / "model.onnx")
        bits = bits_of_kind(shapes, group, kind)
        return {**score(Path(folder) / "model.onnx"), "bits": bits, **took}


def measure_llama_cpp(model: ir.Model, kind: str, score: Score) -> dict[str, Any]:
    """Scores with the values that llama.cpp rounds weights to, and bits per weight."""
    copy = model.clone()
    for old, new in zip(model.graph, copy.graph, strict=True):
        if plan_of(old) is not None:
            floats = constant(new.inputs[1])
            assert floats is not None
            value = new_initializer(copy.graph, f"{new.name}_{kind}", rounded(floats, kind))
            new.replace_input_with(1, value)
    with tempfile.TemporaryDirectory() as folder:
        save_floats(copy, Path(folder) / "model.onnx")
        return {**score(Path(folder) / "model.onnx"), "bits": bits_of(kind)}


def measure_peer(write: Write, source: Path, group: int, score: Score) -> dict[str, Any]:
    """Scores, or why there are none."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model.onnx"
        try:
            write(source, output, group)
            seconds = time.perf_counter() - start
            return {**score(output), "bits": stored_bits(output), "seconds": seconds}
        except Exception as error:  # what a peer cannot do is a result
            return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
