"""Bring any ONNX model into the one form the other passes expect.

1. Model-local functions are inlined; constants become initializers and are folded (never Q/DQ, so
   that an imported quantization survives).
2. The opset is raised to at least 21, the first with INT4 and blocked Q/DQ.
3. Gemm becomes MatMul and Add, with alpha, beta and transposes folded into its constants.
4. Shapes are inferred; every node and value has a name of its own.
"""

from __future__ import annotations

import logging

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer, version_converter

from qcompiler.ir.errors import ModelError
from qcompiler.ir.graph import constant, new_initializer, replace_nodes
from qcompiler.ir.qdq_rules import qdq_problems

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
                looks at no shapes of scales.
        """
        before = _signature(model)
        levels = {name: logging.getLogger(name).level for name in _QUIET}
        try:
            for name in _QUIET:
                # Failed shape inference is no news here: what is unknown stays unknown.
                logging.getLogger(name).setLevel(logging.ERROR)
            _normalise(model)
            _raise_opset(model)
            _simplify(model)
        except ModelError:
            raise
        except Exception as error:
            # These are other libraries' passes on a model that nobody has checked yet.
            raise ModelError(f"the model cannot be brought into canonical form: {error}") from error
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
        for _, node, problem in qdq_problems(model):
            raise ModelError(f"the model is not valid ONNX: {node}: {problem}")
        return ir.passes.PassResult(model, _signature(model) != before)


def _signature(model: ir.Model) -> tuple[object, ...]:
    """What this pass may change; shapes and names that were missing do not count."""
    nodes = tuple((node.op_type, len(node.inputs)) for node in model.graph.all_nodes())
    return nodes, dict(model.graph.opset_imports), len(model.functions)


def _normalise(model: ir.Model) -> None:
    ir.passes.Sequential(
        common.InlinePass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.RemoveInitializersFromInputsPass(),
        common.TopologicalSortPass(),
        common.NameFixPass(),
    )(model)
    for index, node in enumerate(model.graph.all_nodes()):
        if not node.name:
            node.name = f"{node.op_type}_{index}"
        # The model may come out of a bundle: its decisions were about other nodes.
        for key in [key for key in node.metadata_props if key.startswith("qcompiler.")]:
            del node.metadata_props[key]


def _raise_opset(model: ir.Model) -> None:
    opset = model.graph.opset_imports.get("", 1)
    if opset >= OPSET:
        return
    version_converter.ConvertVersionPass(OPSET, fallback=True)(model)
    reached = model.graph.opset_imports.get("", 1)
    if reached < OPSET:
        raise ModelError(
            f"cannot raise the model from opset {opset} to {OPSET}: an op of it has no converter; "
            "export it again with a newer opset"
        )


def _simplify(model: ir.Model) -> None:
    for _ in range(2):
        optimizer.fold_constants(model, onnx_shape_inference=False, should_fold=_should_fold)
        _lift(model)
        _expand_gemms(model)
    if not any(True for _ in model.graph.subgraphs()):
        # onnx_ir 1.1 fails on an Identity that hands an outer value out of an If branch.
        common.IdentityEliminationPass()(model)
    ir.passes.Sequential(
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.ShapeInferencePass(strict_mode=False),
        common.NameFixPass(),
    )(model)
    # Metadata on nodes came with IR 10; more than the opset needs would shut out older ORTs.
    needed = onnx.helper.find_min_ir_version_for(
        [onnx.helper.make_opsetid("", model.graph.opset_imports[""])]
    )
    model.ir_version = max(needed, 10)


def _lift(model: ir.Model) -> None:
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveUnusedNodesPass()(model)


def _should_fold(node: ir.Node) -> bool | None:
    if node.op_type in _KEEP or node.domain not in ("", "ai.onnx"):
        return False
    return True if node.op_type in _FOLD_ANY_SIZE else None


def _expand_gemms(model: ir.Model) -> None:
    for node in list(model.graph.all_nodes()):
        if node.op_type == "Gemm" and node.domain == "":
            _try_expand_gemm(model.graph, node)


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
        scaled = np.ascontiguousarray(turned if alpha == 1.0 else turned * weight.dtype.type(alpha))
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
