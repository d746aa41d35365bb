"""4-bit weights of three models, rounded in several ways: scores, time and memory.

    pip install '.[cpu]' torch transformers accelerate gguf tokenizers scipy onnxsim
    python benchmarks/weights.py smollm2 --text wikitext2-valid.txt --json FILE
    python benchmarks/weights.py minilm --sts sts-dev.csv --train sts-train.csv --json FILE
    python benchmarks/weights.py whisper --sts sts-dev.csv --json FILE

SmolLM2 is scored by its perplexity on windows of 512 tokens from the beginning of WikiText-2's
validation part (CC BY-SA 3.0), and calibrated with 32 windows of its end.  MiniLM is scored on the
dev split of the STS benchmark, and calibrated with sentences of the training split.  The decoder of
Whisper tiny.en is scored on sentences of that split that espeak-ng says.  The matrices
of all layers are rounded; embeddings, and the head that shares its table with one, stay float; so
do activations, for every contender, so that nothing but the weights differs.  ONNX Runtime's
quantizers, onnxsim's and llama.cpp's are the peers.

The weights of SmolLM2 once lay on a grid of 4 bits in groups of 32 with a zero point that is a
float, so that groups of 32 are easy, above all with such zero points (ONNX Runtime's HQQ).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import logging
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
from llama_cpp import bits_of, rounded
from weight_cases import Case, minilm, smollm2, whisper_decoder
from weight_kinds import KINDS, bits_of_kind, type_of
from weight_peers import ONNXSIM_GROUP, of_onnxruntime, of_onnxsim, stored_bits
from weight_table import Table

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

GROUPS = (32, 64, 128, 0)
"""Weights per scale; 0: one scale per channel."""

LLAMA_CPP = ("Q4_0", "Q4_1", "Q4_K")
LLAMA_CPP_GROUP = 32
"""All have groups of it."""

Score = Callable[[Path], dict[str, float]]


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


def measure_peer(
    write: Callable[[Path, Path, int], None], source: Path, group: int, score: Score
) -> dict[str, Any]:
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


def case_of(arguments: argparse.Namespace) -> Case:
    """The model that was asked for."""
    if arguments.model == "smollm2":
        if arguments.text is None:
            raise SystemExit("smollm2 wants --text")
        counts = (arguments.count or 32, arguments.calibrate or 32)
        return smollm2(arguments.text, *counts, held_out=arguments.held_out)
    if arguments.model == "whisper":
        if arguments.sts is None:
            raise SystemExit("whisper wants --sts")
        return whisper_decoder(arguments.sts, arguments.count or 40, arguments.calibrate or 16)
    if arguments.sts is None or arguments.train is None:
        raise SystemExit("minilm wants --sts and --train")
    count, calibrate = arguments.count or 1500, arguments.calibrate or 256
    return minilm(arguments.sts, arguments.train, count, calibrate)


def measure_group(
    table: Table, case: Case, model: ir.Model, group: int, kinds: Sequence[str], runs: LayerRuns
) -> None:
    """All contenders with so many weights per scale."""
    for rounding in ROUNDINGS:
        for kind in kinds:
            asked = (model, group, kind, rounding, runs, case.score)
            table.note(f"{rounding}, {kind}", group, partial(measure_ours, *asked))
    writers = of_onnxruntime(case.calibration, case.head)
    if group == ONNXSIM_GROUP:
        writers |= of_onnxsim(case.calibration, case.head)
    for name, write in writers.items():
        # Per channel is one block longer than any column; it must be a power of two.
        size = group or 2048
        table.note(name, group, partial(measure_peer, write, case.source, size, case.score))
    for kind in LLAMA_CPP if group == LLAMA_CPP_GROUP else ():
        table.note(f"llama.cpp {kind}", group, partial(measure_llama_cpp, model, kind, case.score))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=["smollm2", "minilm", "whisper"])
    parser.add_argument("--text", type=Path)
    parser.add_argument("--sts", type=Path)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--count", type=int, help="windows or pairs to score")
    parser.add_argument("--calibrate", type=int, help="windows or sentences to calibrate on")
    parser.add_argument("--group", type=int, action="append", help="0: per channel; default all")
    parser.add_argument("--only", action="append", help="contenders whose names begin so")
    parser.add_argument("--kind", action="append", choices=KINDS, help="of groups; default all")
    parser.add_argument("--held-out", action="store_true", help="score windows between those")
    parser.add_argument("--workers", type=int, default=1, help="layers rounded side by side")
    parser.add_argument("--json", type=Path, help="results are added to those that are there")
    return parser


def main() -> None:
    arguments = parser().parse_args()
    logging.disable(logging.WARNING)
    case = case_of(arguments)
    facts = {"count": case.count, "calibrate": len(case.calibration)}
    facts |= {"held_out": True} if arguments.held_out else {}
    table = Table(arguments.json, arguments.model, facts, arguments.only or ())
    table.note("float", None, lambda: case.score(case.source))
    runs = LayerRuns(walker(Samples(lambda: iter(case.calibration))))
    if arguments.workers > 1:
        executor = concurrent.futures.ThreadPoolExecutor(arguments.workers)
        runs = dataclasses.replace(runs, executor=executor)
    model = planned(case.source, case.head)
    for group in arguments.group or GROUPS:
        measure_group(table, case, model, group, arguments.kind or list(KINDS), runs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of this process: {peak:.0f} MiB")


if __name__ == "__main__":
    main()
