"""Bring any ONNX model into the one form the other passes expect.

1. Model-local functions are inlined; constants become initializers (weights those of the main
   graph) and are folded, but never Q/DQ, so that an imported quantization survives.
2. The opset is raised to at least 21, the first with INT4 and blocked Q/DQ; what ONNX Runtime's
   optimizers fused is taken apart (`expand_fusions`).
3. Gemm becomes MatMul and Add, with alpha, beta and transposes folded into its constants.
4. Shapes are inferred; every node and value has a name of its own.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

from qcompiler.ir.errors import ModelError, first_cause
from qcompiler.ir.graph import (
    bodies,
    constant,
    every_graph,
    every_node,
    new_initializer,
    replace_nodes,
)
from qcompiler.ir.qdq_rules import qdq_problems
from qcompiler.ir.shape_rules import shape_problems
from qcompiler.passes.expand_fusions import ExpandFusions
from qcompiler.passes.fix_names import FixNames
from qcompiler.passes.infer_shapes import InferShapes, merge_shapes
from qcompiler.passes.raise_opset import RaiseOpset
from qcompiler.passes.removed_bodies import release_outer_values
from qcompiler.passes.weightless import SMALL

__all__ = ["OPSET", "Canonicalize"]

OPSET = 21

_KEEP = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
_FOLD_ANY_SIZE = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Cast"})
_QUIET = ("onnxscript", "onnx_ir")


class Canonicalize(ir.passes.InPlacePass):
    """Inline, raise the opset, fold constants, expand Gemm, infer shapes."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Canonicalize in place.

        Raises:
            ModelError: The opset cannot be raised, or the model is inconsistent: ONNX's checker
                looks at no shapes, neither of scales nor of operands that do not fit.
        """
        before, said = _signature(model), [value.shape for value in model.graph.outputs]
        levels = {name: logging.getLogger(name).level for name in _QUIET}
        try:
            for name in _QUIET:
                # Failed shape inference is no news here: what is unknown stays unknown.
                logging.getLogger(name).setLevel(logging.ERROR)
            _normalise(model)
            had_bodies = any(bodies(node) for node in model.graph)
            RaiseOpset(OPSET)(model)
            inference = InferShapes()
            inference(model)
            while ExpandFusions()(model).modified:
                # The types behind one of them were not known before, which others need.
                inference(model)
            _simplify(model)
            if had_bodies:
                release_outer_values(model)
            _keep_names(model.graph, said)
        except ModelError:
            raise
        except Exception as error:
            # These are other libraries' passes on a model that nobody has checked yet.
            reason = f"the model cannot be brought into canonical form: {first_cause(error)}"
            raise ModelError(reason) from error
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
        mistaken = shape_problems(model) if inference.in_doubt else ()
        for _, node, problem in itertools.chain(qdq_problems(model), mistaken):
            raise ModelError(f"the model is not valid ONNX: {node}: {problem}")
        return ir.passes.PassResult(model, _signature(model) != before)


def _keep_names(graph: ir.Graph, said: Sequence[ir.Shape | None]) -> None:
    """Name dimensions of results as the model did: an Identity or Cast goes with its names."""
    for value, shape in zip(graph.outputs, said, strict=True):
        if value.shape is not None and value.producer() is not None:
            value.shape = merge_shapes(value.shape, shape)


def _signature(model: ir.Model) -> tuple[object, ...]:
    """What this pass may change; shapes and names that were missing do not count."""
    nodes = list(every_node(model.graph))
    ops, operands = [node.op_type for node in nodes], [len(node.inputs) for node in nodes]
    return ops, operands, dict(model.graph.opset_imports), len(model.functions)


def _normalise(model: ir.Model) -> None:
    if model.functions:
        _align_functions(model)
        common.InlinePass()(model)
    _lift_constants(model)
    common.RemoveInitializersFromInputsPass()(model)
    FixNames()(model)
    _lift_weights(model)
    if not _is_sorted(model.graph, set()):
        model.graph.sort()
    for node in every_node(model.graph):
        # The model may come out of a bundle: its decisions were about other nodes.
        for key in [key for key in node.metadata_props if key.startswith("qcompiler.")]:
            del node.metadata_props[key]


def _lift_constants(model: ir.Model) -> None:
    if any(node.op_type == "Constant" for node in every_node(model.graph)):
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


def _lift_weights(model: ir.Model) -> None:
    """Move weights out of bodies; small constants stay, where shape inference looks for them."""
    for graph in list(every_graph(model.graph))[1:]:
        for name, value in list(graph.initializers.items()):
            outer = value.is_graph_input() or value.is_graph_output()
            if not outer and value.const_value and value.const_value.nbytes > SMALL:
                del graph.initializers[name]
                model.graph.register_initializer(value)


def _align_functions(model: ir.Model) -> None:
    """Let functions import the model's opset where their ops are the same in it, as ORT does."""
    opset = model.graph.opset_imports.get("")
    for function in model.functions.values():
        theirs = function.opset_imports.get("")
        if (
            opset
            and theirs
            and theirs != opset
            and all(
                _since(node.op_type, theirs) == _since(node.op_type, opset)
                for node in every_node(function)
                if node.domain == ""
            )
        ):
            function.opset_imports[""] = opset


def _since(op: str, opset: int) -> int:
    return int(onnx.defs.get_schema(op, opset).since_version)


def _is_sorted(graph: ir.Graph, made: set[ir.Value]) -> bool:
    """Whether each node comes after those that it and its bodies read, which most models' do."""
    for node in graph:
        if not all(value in made for value in node.inputs if value and value.producer()):
            return False
        if not all(_is_sorted(body, made) for body in bodies(node)):
            return False
        made.update(node.outputs)
    return True


def _simplify(model: ir.Model) -> None:
    changed = False
    for _ in range(2):
        folded = _FoldConstants()(model).modified
        _lift_constants(model)
        expanded = _expand_gemms(model)
        changed = changed or folded or expanded
        if not (folded or expanded):
            break
    if not any(bodies(node) for node in model.graph):
        # onnx_ir 1.1 fails on an Identity that hands an outer value out of an If branch.
        _DropIdentities()(model)
    if _has_twins(model.graph) and not any(_is_drawn(node) for node in every_node(model.graph)):
        common.CommonSubexpressionEliminationPass()(model)
    _drop_unused(model)
    FixNames()(model)
    if changed:
        InferShapes()(model)
    # Metadata on nodes came with IR 10; more than the opset needs would shut out older ORTs.
    needed = onnx.helper.find_min_ir_version_for(
        [onnx.helper.make_opsetid("", model.graph.opset_imports[""])]
    )
    model.ir_version = max(needed, 10)


def _has_twins(graph: ir.Graph) -> bool:
    """Whether two nodes may be the same: numbers are made sooner than what onnx_ir compares."""
    simple = (node for node in graph if not bodies(node))
    nodes = [hash((node.op_type, *map(id, node.inputs))) for node in simple]
    return len(set(nodes)) < len(nodes)


def _drop_unused(model: ir.Model) -> None:
    """Let onnx_ir remove what nothing reads, where a quicker look says that there is any."""
    constants = (v for v in model.graph.initializers.values() if not v.is_graph_input())
    unread = any(not v.uses() and not v.is_graph_output() for v in constants)
    if model.functions or unread or any(_is_slack(node) for node in every_node(model.graph)):
        common.RemoveUnusedNodesPass()(model)
    if model.functions:
        common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    if len(model.graph.opset_imports) > 1:
        common.RemoveUnusedOpsetsPass()(model)


def _is_slack(node: ir.Node) -> bool:
    """Whether a node has results that nothing reads, operands left out at the end, or a mode."""
    return (
        any(not value.uses() and not value.is_graph_output() for value in node.outputs)
        or (len(node.inputs) > 0 and node.inputs[-1] is None)
        or "training_mode" in node.attributes.data
    )


def _is_drawn(node: ir.Node) -> bool:
    """Whether two such nodes may give different results for the same inputs."""
    if node.domain in ("", "ai.onnx.ml", "com.microsoft"):
        return node.op_type in ("Bernoulli", "Dropout")  # the others that draw, onnx_ir knows of
    return True


class _DropIdentities(common.IdentityEliminationPass):
    """onnx_ir's, but an output that is another one again stays: 1.1 makes one name of both."""

    def _try_eliminate_identity_node(self, node: ir.Node) -> bool:
        ends = (*node.inputs, *node.outputs)
        if node.op_type == "Identity" and all(v is not None and v.is_graph_output() for v in ends):
            return False
        return super()._try_eliminate_identity_node(node)


class _FoldConstants(optimizer.constant_folding.FoldConstantsPass):  # type: ignore[misc]
    """onnxscript's folding, in which an op that one of its rules fails on stays as it is."""

    def __init__(self) -> None:
        limits = optimizer.constant_folding
        super().__init__(
            shape_inference=False,
            input_size_limit=limits.DEFAULT_CONSTANT_FOLD_INPUT_SIZE_LIMIT,
            output_size_limit=limits.DEFAULT_CONSTANT_FOLD_OUTPUT_SIZE_LIMIT,
            should_fold=_should_fold,
        )

    def process_node(self, node: ir.Node, is_function: bool) -> Any:
        if node.op_type == "CastLike" and node.attributes:
            return None  # its rule loses `saturate`
        if not self._may_fold(node):
            return None
        try:
            return super().process_node(node, is_function)
        except RuntimeError:
            return None

    def _may_fold(self, node: ir.Node) -> bool:
        """A look at what most nodes lack: constant operands, replaced ones, or a rule."""
        replaced = self._state.symbolic_value_map
        return (
            (node.domain, node.op_type) in optimizer.constant_folding.registry.op_evaluators
            or all(value is None or value.const_value is not None for value in node.inputs)
            or any(value in replaced for value in node.inputs if value is not None)
        )


def _should_fold(node: ir.Node) -> bool | None:
    if node.op_type in _KEEP or node.domain not in ("", "ai.onnx"):
        return False
    return True if node.op_type in _FOLD_ANY_SIZE else None


def _expand_gemms(model: ir.Model) -> bool:
    nodes = list(every_node(model.graph))
    gemms = [node for node in nodes if node.op_type == "Gemm" and node.domain == ""]
    return any([_try_expand_gemm(model.graph, node) for node in gemms])


def _try_expand_gemm(graph: ir.Graph, gemm: ir.Node) -> bool:
    """Gemm(x, W, b) => Add(MatMul(x, alpha * W'), beta * b); W and b constant, x as it is."""
    attributes = gemm.attributes
    weight = constant(gemm.inputs[1])
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    alpha, beta = attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0)
    bias_array = constant(bias)
    movable = weight is not None and attributes.get_int("transA", 0) == 0
    if not movable or (bias is not None and bias_array is None and beta != 1.0):
        return False
    assert weight is not None
    value = gemm.inputs[1]
    if attributes.get_int("transB", 0) or alpha != 1.0:
        turned = weight.T if attributes.get_int("transB", 0) else weight
        # A transpose stays a view, which takes no memory where the weight is mapped from a file.
        scaled = turned if alpha == 1.0 else turned * weight.dtype.type(alpha)
        value = new_initializer(graph, f"{gemm.name}_weight", scaled)
    product = ir.node("MatMul", [gemm.inputs[0], value], name=gemm.name)
    new = [product]
    if bias is not None:
        if bias_array is not None and beta != 1.0:
            bias = new_initializer(graph, f"{gemm.name}_bias", bias_array * weight.dtype.type(beta))
        last = ir.node("Add", [product.outputs[0], bias], name=f"{gemm.name}_bias")
        result, inner = gemm.outputs[0], product.outputs[0]
        inner.name, inner.type, inner.shape = f"{result.name}_product", result.type, result.shape
        new.append(last)
    replace_nodes([gemm], new)
    return True
