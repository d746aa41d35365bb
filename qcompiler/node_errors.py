"""Where between a model and its bundle errors arise, node by node.

A tensor of the bundle that bears the name of one of the model's is that tensor, computed otherwise.
Each is looked at twice:

total   on the samples: with whatever went wrong before it
own     with every such tensor before it replaced by the model's: what its own node does wrong
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompiler.bundle import MODEL
from qcompiler.cuts import EXACT, Cut, altered, cuts_of, separated
from qcompiler.frontend import load_model
from qcompiler.ir.decisions import decision_of
from qcompiler.ir.errors import ModelError, said_by_ort
from qcompiler.output_error import ErrorSums, OutputError
from qcompiler.passes.canonicalize import Canonicalize
from qcompiler.passes.infer_shapes import InferShapes
from qcompiler.passes.widen_floats import WidenFloats
from qcompiler.probe import Probe
from qcompiler.runtime import open_altered
from qcompiler.samples import Sample, Samples

__all__ = ["NodeError", "node_errors", "worst_first"]

_QUANTIZATION = frozenset({
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul",
    "MatMulInteger", "ConvInteger",
})  # fmt: skip
_KEEPABLE = ("QMatMul", "DynamicQMatMul", "RequantizedQMatMul", "WindowedQMatMul", "QConv")
_HAND_ON = frozenset({
    "DequantizeLinear", "Flatten", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
    "Unsqueeze",
})  # fmt: skip
"""Ops that hand on integers as they are: what they store is for those that read it."""
_JOINED = " + "


@dataclasses.dataclass(frozen=True)
class NodeError:
    """One node that computes otherwise than the model does.

    Attributes:
        node: Its name; "a + b" if several became one.
        op: Its type.
        tensor: The model's tensor that it computes; one of them if it computes several.
        action: Who computes it, and
        why: for what reason.
        own: The error that the node adds to exact inputs.
        total: The error of its result in the bundle.
        keep: The nodes that `keep_float` takes the error away with: itself, or, where a tensor is
            stored as integers, those that read it; none where the source is quantized itself.
    """

    node: str
    op: str
    tensor: str
    action: str
    why: str
    own: OutputError
    total: OutputError
    keep: tuple[str, ...]

    @property
    def can_stay_float(self) -> bool:
        """Whether `keep_float` takes the node's error away."""
        return bool(self.keep)

    @property
    def remedy(self) -> str:
        """What would help, as an option or a line of the recipe."""
        if self.keep:
            return " ".join(f"--keep-float {shlex.quote(name)}" for name in self.keep)
        rounded = self.op.endswith(("_bf16", "_int8"))
        return 'attention = "float32" in the recipe' if rounded else ""


def node_errors(
    model: Path,
    bundle: Path,
    samples: Samples,
    *,
    native: bool = True,
    progress: Callable[[str, float, int], None] | None = None,
) -> list[NodeError]:
    """The errors of every node that the bundle computes in its own way, in the graph's order.

    All of these tensors are in memory for one sample at a time.

    Args:
        model: The ONNX file.
        bundle: Its bundle, or any ONNX file with tensors of the same names.
        samples: What both are run on.
        native: Use the bundle's kernels; False runs its functions' bodies.
        progress: Told (what is run, samples done, samples in all).

    Raises:
        CalibrationError: A sample that does not fit.
        ModelError: A side cannot be loaded or fails.
    """
    source = load_model(model)
    path = bundle / MODEL if bundle.is_dir() else bundle
    InferShapes()(source)
    _widen(source)
    values = [*source.graph.inputs, *(v for node in source.graph for v in node.outputs)]
    floats = {v.name or "" for v in values if v.dtype is ir.DataType.FLOAT}
    cuts = cuts_of(separated(path), floats)
    if not cuts:
        return []
    sides = [
        open_altered(bundle, altered(path, cuts, exact=exact), native=native)
        for exact in (True, False)
    ]
    tell = progress or (lambda label, done, total: None)
    sums = _sum_up(source, cuts, sides, bundle, samples, tell)
    keepable = {node.name or "" for node in source.graph}
    if any(node.op_type in _QUANTIZATION for node in source.graph):
        keepable = set()
    return [
        _error(cut, own.result(), total.result(), keepable)
        for cut, (own, total) in zip(cuts, sums, strict=True)
    ]


def _widen(source: ir.Model) -> None:
    """Bring a model of 16-bit floats into float32, as it was before anything was quantized."""
    values = (value for node in source.graph for value in node.outputs)
    if any(value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) for value in values):
        Canonicalize()(source)
        WidenFloats()(source)


def _sum_up(
    source: ir.Model, cuts: Sequence[Cut], sides: Sequence[Any], bundle: Path, samples: Samples,
    tell: Callable[[str, float, int], None],
) -> list[tuple[ErrorSums, ErrorSums]]:  # fmt: skip
    """Of each tensor, how either side errs in it over all samples."""
    sums = [(ErrorSums(cut.tensor), ErrorSums(cut.tensor)) for cut in cuts]
    names = [value.name or "" for value in source.graph.inputs]
    with Probe(source, list(dict.fromkeys([*names, *(cut.tensor for cut in cuts)]))) as probe:
        for number, (label, tensors) in enumerate(probe.run(lambda given: samples), 1):
            for index, session in enumerate(sides):
                found = _run(session, tensors, bundle, label)
                for cut, pair, actual in zip(cuts, sums, found, strict=True):
                    pair[index].add(tensors[cut.tensor], actual, None)
            tell("node by node", number, len(samples))
    return sums


def _error(cut: Cut, own: OutputError, total: OutputError, names: Collection[str]) -> NodeError:
    """The error of a node; `names` are those that the source has, none if it is quantized."""
    made = decision_of(cut.node)
    keep = tuple(made.node.split(_JOINED)) if _can_stay(cut.node, names) else ()
    if cut.node.op_type == "QuantizeLinear":
        keep = _around(cut.node, names)
    return NodeError(made.node, made.op, cut.tensor, made.action, made.why, own, total, keep)


def _can_stay(node: ir.Node, names: Collection[str]) -> bool:
    """Whether `keep_float` is about a node of the bundle; `names` are the source's."""
    made = decision_of(node)
    # What lies between layers hands on integers, or is left float as they are.
    between = made.op not in _QUANTIZATION and made.node in names
    return bool(names) and (between or made.op.startswith(_KEEPABLE))


def _around(quantize: ir.Node, names: Collection[str]) -> tuple[str, ...]:
    """The nodes without which nobody would store a tensor as integers: who reads and makes them.

    None if one of them cannot stay float.
    """
    maker = None if quantize.inputs[0] is None else quantize.inputs[0].producer()
    around = [] if maker is None or decision_of(maker).action != "qdq" else [maker]
    values = list(quantize.outputs)
    for value in values:
        for node in value.consumers():
            if node.op_type in _HAND_ON and node.domain == "":
                values.extend(each for each in node.outputs if each not in values)
            elif decision_of(node).action != "float":
                around.append(node)
    if not all(_can_stay(node, names) for node in around):
        return ()
    found = (name for node in around for name in decision_of(node).node.split(_JOINED))
    return tuple(dict.fromkeys(found))


def worst_first(errors: Iterable[NodeError]) -> list[NodeError]:
    """One entry per node, its worst tensor, by the error of its own; exact nodes are left out."""
    worst: dict[str, NodeError] = {}
    for error in sorted(errors, key=_own):
        if error.own.sqnr is not None:
            worst.setdefault(error.node, error)
    return list(worst.values())


def _own(error: NodeError) -> float:
    return math.inf if error.own.sqnr is None else error.own.sqnr


def _run(session: Any, tensors: Sample, bundle: Path, label: str) -> Sequence[Any]:
    given = tensors | {EXACT.format(name): array for name, array in tensors.items()}
    wanted = {value.name for value in session.get_inputs()}
    try:
        found: Sequence[Any] = session.run(None, {k: v for k, v in given.items() if k in wanted})
    except Exception as error:
        # ORT raises bare RuntimeErrors as well as its own types.
        raise ModelError(f"{bundle} fails on {label}: {said_by_ort(error)}") from error
    return found
