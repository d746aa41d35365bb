"""Compute in float16 what is left in float32.

    y = Gelu(Add(QMatMulW8A8(q, s, w, ws), b))
        =>   half = Cast <to = FLOAT16> (QMatMulW8A8(q, s, w, ws))
             y = Cast <to = FLOAT> (Gelu(Add(half, b_float16)))

Constants are rounded; results become float16; Casts stand between such nodes and those that stay
in float32: `float16_rules` says which and why, and so does a node whose values leave the range of
float16 where the model is run (`float16_ranges`).  Masks are brought into it (`mask_constants`).
Inputs and outputs of the model and of bodies keep their types.  LayerNormalization and Softmax sum
in float32 inside: that is what the `stash_type` of the first says, and what ONNX Runtime's kernels
of both do.

Ops of ours keep float32 but for QMatMulW4A16, which is the same in either type; `fuse_regions` then
takes the Casts around the others into their regions.  Those that GPUs have kernels of get Casts
beside neighbours that stay in float32, too (`float16_borders`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container, Iterable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qcompiler.ir import dialect
from qcompiler.ir.decisions import MAY_OVERFLOW, add_note
from qcompiler.ir.errors import OptionError, did_you_mean
from qcompiler.ir.graph import constant, drop_if_unread, every_node, new_initializer, place_after
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.float16_borders import border_of, round_borders
from qcompiler.passes.float16_ranges import magnitudes
from qcompiler.passes.float16_rules import (
    BORDER,
    Kept,
    keep_between,
    kept_nodes,
    touches_floats,
)
from qcompiler.passes.float16_scales import note_small_scales
from qcompiler.passes.float16_types import following_inputs, following_outputs, reads_any_type
from qcompiler.passes.mask_constants import clamp_masks
from qcompiler.passes.planned_products import Sampler
from qcompiler.passes.widen_floats import border_cast, drop_idle_casts

__all__ = ["FLOAT_TYPES", "ConvertFloat16", "check_float_type"]

FLOAT_TYPES = ("fp16", "fp32")
"""What the float part of a model may compute in."""

_HALF, _WIDE = ir.DataType.FLOAT16, ir.DataType.FLOAT
_LARGEST = float(np.finfo(np.float16).max)

_UNSEEN = (
    "float16: nobody saw which values leave its range, because the model was not run; give samples "
    "(--calib)"
)
_UNSEEN_BODIES = (
    "float16: bodies of If, Loop and Scan are not looked into; give --float fp32 if values in them "
    "leave its range"
)


def check_float_type(given: object) -> None:
    """Check the name of a float type.

    Raises:
        OptionError: It is neither fp16 nor fp32.
    """
    if given not in FLOAT_TYPES:
        named = {"float16": "fp16", "half": "fp16", "float32": "fp32"}.get(str(given), str(given))
        hint = did_you_mean(named, FLOAT_TYPES) if named == given else f"; did you mean {named!r}?"
        raise OptionError(f"float must be fp16 or fp32, not {given!r}{hint}")


class ConvertFloat16(ir.passes.InPlacePass):
    """Convert the float part of a model.

    Attributes:
        sample: Runs the model; without it nothing is known of the values it reaches.
        options: Whether, and how far from the range values must stay.
        notes: What the user should know of the last run.
    """

    rounds = True

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Whether, and how far from the range values must stay.

        Attributes:
            type: What the float part computes in: fp16, or fp32, which changes nothing.
            headroom: How many times larger than where the model is run values may become elsewhere.
        """

        type: str = "fp16"
        headroom: float = 2.0

        def __post_init__(self) -> None:
            """Check the values.

            Raises:
                OptionError: Another type, or less headroom than none.
            """
            check_float_type(self.type)
            if not 1 <= self.headroom < math.inf:
                raise OptionError(f"headroom must be 1 or more, not {self.headroom}")

    def __init__(self, sample: Sampler | None = None, options: Options | None = None) -> None:
        super().__init__()
        self.sample, self.options = sample, options or self.Options()
        self.notes: tuple[str, ...] = ()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Convert in place.

        Raises:
            CalibrationError: A bad sample.
        """
        self.notes = ()
        if self.options.type != "fp16":
            return ir.passes.PassResult(model, False)
        changed, masked = clamp_masks(model)
        kept = kept_nodes(model)
        nodes = [node for node in every_node(model.graph) if touches_floats(node)]
        beyond = self._keep_beyond(model, nodes, kept, masked)
        keep_between(nodes, kept)
        for node, reason in kept.items():
            if reason:
                add_note(node, reason)
        note_small_scales(node for node in nodes if node not in kept)
        conversion = _Conversion(model, [n for n in nodes if n not in kept])
        changed |= conversion.run(nodes)
        changed |= round_borders(nodes, beyond, conversion.as_type)
        changed |= drop_idle_casts(model)
        if changed:
            common.RemoveUnusedNodesPass()(model)
            FixNames()(model)
            dialect.declare(model)
        return ir.passes.PassResult(model, changed)

    def _keep_beyond(
        self, model: ir.Model, nodes: Iterable[ir.Node], kept: Kept, masked: Container[ir.Value]
    ) -> set[ir.Value]:
        """Keep what makes or reads values that leave the range when the model is run; those."""
        opset = model.graph.opset_imports[""]
        values: dict[ir.Value, None] = {}
        for node in nodes:
            if node not in kept and node.graph is model.graph:
                read = (node.inputs[index] for index in following_inputs(node, opset))
                known = (v for v in read if v is not None and constant(v) is None)
                values.update(dict.fromkeys([*known, *following_outputs(node, opset)]))
            border = border_of(node)
            if border is not None and border.dtype is _WIDE:
                values[border] = None
        inside = [v for v in values if v.graph is model.graph and v not in masked]
        found = {} if self.sample is None else magnitudes(model, inside, self.sample)
        if inside and not found:
            self.notes = (_UNSEEN,)
        elif any(n not in kept and n.graph is not model.graph for n in nodes):
            self.notes = (_UNSEEN_BODIES,)
        beyond = [v for v, reached in found.items() if reached * self.options.headroom > _LARGEST]
        for value in beyond:
            reached = found[value]
            what = f"reached {reached:.3g} where the model was run, and float16 ends at 65504"
            maker = value.producer()
            if maker is not None:
                _keep(kept, maker, f"{MAY_OVERFLOW}: its result {what}")
            for use in value.uses():
                if not reads_any_type(use.node) or use.node.op_type == "Cast":
                    _keep(kept, use.node, f"{MAY_OVERFLOW}: {value.name} {what}")
        return set(beyond)


def _keep(kept: Kept, node: ir.Node, reason: str) -> None:
    """Ops of ours, which stay in any case, say what keeps their kernel away."""
    if node not in kept or (not kept[node] and border_of(node) is not None):
        kept[node] = reason


class _Conversion:
    """Gives nodes their types, and puts Casts where two types meet."""

    def __init__(self, model: ir.Model, halved: Iterable[ir.Node]) -> None:
        self.model, self.halved = model, set(halved)
        self.opset = model.graph.opset_imports[""]
        self.made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self, nodes: Iterable[ir.Node]) -> bool:
        """Convert; whether anything was changed."""
        wanted = {node: self._wanted(node) for node in nodes}
        graphs = list(self.model.graphs())
        results = {v for node in nodes if node in self.halved for v in self._results(node)}
        outputs = [
            (graph, index, value)
            for graph in graphs
            for index, value in enumerate(graph.outputs)
            if value in results
        ]
        for value in results:
            value.type = ir.TensorType(_HALF)  # the one it has may be other values' too
        changed = bool(results)
        for node, operands in wanted.items():
            for index, dtype in operands.items():
                operand = node.inputs[index]
                if operand is not None and operand.dtype is not dtype:
                    node.replace_input_with(index, self.as_type(operand, dtype))
                    drop_if_unread(operand)
                    changed = True
        for graph, index, value in outputs:
            self._restore_output(graph, index, value)
        return changed

    def _wanted(self, node: ir.Node) -> dict[int, ir.DataType]:
        """The type of each operand that is FLOAT now."""
        if reads_any_type(node):
            return {}
        wanted = {i: _WIDE for i, v in enumerate(node.inputs) if v is not None and v.dtype is _WIDE}
        if node in self.halved:
            wanted |= dict.fromkeys(following_inputs(node, self.opset), _HALF)
        return wanted

    def _results(self, node: ir.Node) -> list[ir.Value]:
        if node.op_type == "Cast" and node.domain == "":
            if node.outputs[0].dtype is not _WIDE:
                return []
            node.attributes["to"] = ir.AttrInt64("to", int(_HALF))
        return following_outputs(node, self.opset)

    def as_type(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The value in another type, cast once for all its readers."""
        key = (value, dtype)
        if key not in self.made:
            stem = f"{value.name}_{'float16' if dtype is _HALF else 'float32'}"
            array = constant(value)
            if array is not None:
                graph = value.graph if isinstance(value.graph, ir.Graph) else self.model.graph
                with np.errstate(over="ignore"):
                    rounded = np.asarray(array, dtype.numpy())
                self.made[key] = new_initializer(graph, stem, rounded)
            else:
                cast = border_cast(value, dtype, stem, BORDER)
                place_after(value, [cast])
                self.made[key] = cast.outputs[0]
        return self.made[key]

    def _restore_output(self, graph: ir.Graph, index: int, value: ir.Value) -> None:
        """Let an output of a graph keep its name and type."""
        wide = self.as_type(value, _WIDE)
        if graph is self.model.graph:
            value.name, wide.name = f"{value.name}_float16", value.name
        graph.outputs[index] = wide
