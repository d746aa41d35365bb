"""An exported program as an ONNX model, its quantized ops as Q and DQ."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import torch

from qcompiler.from_torch.float_zero_points import float_zero_points
from qcompiler.from_torch.integer_products import integer_products
from qcompiler.from_torch.ops import translations
from qcompiler.from_torch.pack import pack_constants
from qcompiler.from_torch.signature import check_outputs, mark_unwritten
from qcompiler.from_torch.unsigned_pairs import unsigned_pairs
from qcompiler.ir.errors import ModelError

__all__ = ["to_onnx"]

_OPSET = 21
"""The first with INT4, INT16 and blocked Q and DQ."""

_NODE = re.compile(r"node %(\w+).*?target=([\w.]+)")
_OVERLOAD = re.compile(r"No ONNX function found for")


def to_onnx(program: torch.export.ExportedProgram) -> ir.Model:
    """The ONNX model of a program.

    Raises:
        ModelError: An op of it has no translation, or a result is no tensor; it is named.
    """
    check_outputs(program)
    try:
        with _quiet():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=_OPSET,
                verbose=False,
                custom_translation_table=translations(),
            )
    except torch.onnx.OnnxExporterError as error:
        raise ModelError(_explain(error)) from error
    assert exported is not None
    # The exporter's model shares memory with torch; bytes of our own outlive it.
    model: ir.Model = ir.from_proto(exported.model_proto)
    integer_products(model)
    pack_constants(model)
    float_zero_points(model)
    unsigned_pairs(model)
    mark_unwritten(model, exported.exported_program or program)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what parts of torch say of each other, and that torchvision is not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _explain(error: Exception) -> str:
    """One sentence for the exporter's chain of errors: which op, and what to do about it."""
    chain = list(_causes(error))
    found = next((match for cause in chain if (match := _NODE.search(str(cause)))), None)
    first, *_ = str(chain[-1]).strip().splitlines() or [type(chain[-1]).__name__]
    if found is None:
        return f"torch cannot express this program in ONNX: {first}"
    node, op = found.groups()
    reason = "it has no ONNX form" if _OVERLOAD.match(first) else first
    return (
        f"torch cannot translate {node} ({op}) to ONNX: {reason}; decompose it with "
        "program.run_decompositions({...}) or write that part of the module in other ops"
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
