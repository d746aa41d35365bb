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
from qcompiler.ir.decisions import (
    NO_WEIGHTS,
    bias_shift,
    decision_of,
    left_to_ort,
    operand_plan_of,
    plan_of,
)
from qcompiler.ir.stages import verify
from qcompiler.passes.choose_kernels import ChooseKernels
from qcompiler.passes.shift_weights import ShiftWeights
from qcompiler.pipeline import Pipeline, Step
from qcompiler.session_options import new_session_options
from qcompiler.targets.catalog import get_target

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


def text_of(model: ir.Model, *, notes: bool = False) -> str:
    """The graph as text in which only structure counts: names in order of appearance.

    Args:
        model: Only its main graph is printed.
        notes: Below each node, its plan and its decision.
    """
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
        # The hash in a bound domain changes with every source of a kernel.
        domain = re.sub(r"(?<=^qcompiler\.)[0-9a-f]{8}$", "<hash>", node.domain)
        prefix = f"{domain}." if domain else ""
        lines.append(f"{results} = {prefix}{node.op_type} {attributes or ''} ({operands})")
        lines += _notes(node) if notes else []
    lines.append(f"outputs {', '.join(str(v.name) for v in bare.graph.outputs)}")
    return "\n".join(lines)


def _notes(node: ir.Node) -> list[str]:
    """What is planned for a node, and its decision if that says anything else."""
    # Ops that plans became keep them, but nobody reads them there.
    plan, decision = None if node.domain else plan_of(node), decision_of(node)
    kinds = ("weight", "activation", "output") if plan else ()
    notes = [f"# {kind} {getattr(plan, kind)}" for kind in kinds if getattr(plan, kind)]
    if handed := operand_plan_of(node):
        notes.append(f"# operands {handed.operands}, output {handed.output}")
    if (shift := bias_shift(node)) is not None:
        notes.append(f"# bias less {[round(float(value), 1) for value in shift]}")
    if plan and (why := left_to_ort(node)):
        notes.append(f"# left to ORT: {why}")
    if (decision.action, decision.why) != (("qdq", str(plan)) if plan else ("float", NO_WEIGHTS)):
        action = decision.action if decision.expected else f"{decision.action}, unexpected"
        notes.append(f"# {action}: {decision.why}")
    return notes


def run(model: ir.Model, feeds: Feeds, *, plainly: bool = False) -> list[NDArray[Any]]:
    """The outputs of a model in stock ONNX Runtime, one thread.

    Args:
        model: Any stage.
        feeds: Its inputs.
        plainly: Node by node, with nothing fused; else at ONNX Runtime's default level.
    """
    copy = model.clone()
    dialect.declare(copy)
    ShiftWeights()(copy)  # or the sums of models that have not been through it yet may saturate
    options = new_session_options()
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
    notes: bool = False,
) -> ir.Model:
    """`rewrite(before)` prints as `after`, does nothing the second time, and keeps the numbers.

    Args:
        rewrite: The pass.
        before: Changed in place.
        after: Lines as `text_of` writes them.
        feeds: Inputs to compare outputs on.
        exact: Outputs must be equal to the last bit or two; else `floor_db` is the SQNR to keep.
        floor_db: See `exact`.
        notes: Whether `after` has plans and decisions.
    """
    original, expected = _changeable(before), None if feeds is None else run(before, feeds)
    modified = rewrite(before).modified
    _assert_text(before, after, notes=notes)
    assert modified == (_changeable(before) != original)
    assert not rewrite(before).modified, "the pass is not idempotent"
    _assert_text(before, after, notes=notes)
    if feeds is not None and expected is not None:
        for got, want in zip(run(before, feeds), expected, strict=True):
            if exact:
                np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6)
            else:
                assert sqnr(want, got) >= floor_db
    return before


def _changeable(model: ir.Model) -> tuple[object, ...]:
    """What a pass that changes it must say it modified: decisions are not."""
    plans = [
        (plan_of(node), operand_plan_of(node), str(bias_shift(node)), left_to_ort(node))
        for node in model.graph.all_nodes()
    ]
    return text_of(model), plans


def _assert_text(model: ir.Model, text: str, *, notes: bool = False) -> None:
    printed = text_of(model, notes=notes)
    wanted = "\n".join(line.strip() for line in text.strip().split("\n"))
    assert printed == wanted, "\n".join(
        difflib.unified_diff(wanted.split("\n"), printed.split("\n"), "want", "got", lineterm="")
    )


def steps_through(
    name: str,
    target: str = "x86-int8",
    choose: ChooseKernels | None = None,
    pipeline: Pipeline | None = None,
) -> list[Step]:
    """The steps of a pipeline, by default the target's, up to and with the pass called `name`."""
    steps = list(pipeline or Pipeline.default(get_target(target), choose=choose))
    return steps[: [step.name for step in steps].index(name) + 1]


def assert_step(
    name: str,
    model: ir.Model,
    before: str,
    after: str | None = None,
    feeds: Feeds | None = None,
    target: str = "x86-int8",
    choose: ChooseKernels | None = None,
    pipeline: Pipeline | None = None,
    **checks: Any,
) -> ir.Model:
    """`assert_rewrites` of one pass of the default pipeline, where those before it leave a model.

    Args:
        name: The pass.
        model: Changed in place.
        before: How it prints just before the pass.
        after: How it prints after it; by default the pass must change nothing.
        feeds: Inputs to compare outputs on.
        target: Whose pipeline.
        choose: See `Pipeline.default`.
        pipeline: In the place of the target's default.
        **checks: See `assert_rewrites`.
    """
    *earlier, step = steps_through(name, target, choose, pipeline)
    model = Pipeline(earlier).run(model)
    _assert_text(model, before)
    assert_rewrites(step.rewrite, model, after or before, feeds, **checks)
    verify(model, step.stage, name)
    return model
