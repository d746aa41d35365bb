"""Model-local functions of another opset than their model's, which ONNX Runtime takes."""

from __future__ import annotations

import onnx
import onnx.inliner

__all__ = ["inline_old_functions"]


def inline_old_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its functions inlined and converted, if one of them is of another opset.

    Those whose ops are the same in both are left to `Canonicalize`.  Weights stay where they are.
    """
    opset = _opset(model)
    if any(_differs(function, opset) for function in model.functions):
        return onnx.inliner.inline_local_functions(model, convert_version=True)
    return model


def _differs(function: onnx.FunctionProto, opset: int) -> bool:
    theirs = _opset(function)
    return theirs != opset and any(
        node.domain in ("", "ai.onnx")
        and _since(node.op_type, theirs) != _since(node.op_type, opset)
        for node in function.node
    )


def _opset(proto: onnx.ModelProto | onnx.FunctionProto) -> int:
    versions = [entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
    return versions[0] if versions else 1


def _since(op: str, opset: int) -> int:
    try:
        return int(onnx.defs.get_schema(op, opset).since_version)
    except onnx.defs.SchemaError:
        return 0
