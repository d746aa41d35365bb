"""qcompiler: a quantizing graph compiler for ONNX Runtime.

    import qcompiler

    report = qcompiler.compile("model.onnx", target="x86-int8")
    session = qcompiler.load(report.bundle)

Names are imported when they are first used: `load` alone needs neither TVM, onnx_ir nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompiler.driver import compile
    from qcompiler.ir.errors import QCompilerError
    from qcompiler.pipeline import Pipeline
    from qcompiler.recipe import Recipe
    from qcompiler.report import Report
    from qcompiler.runtime import load
    from qcompiler.targets.catalog import get_target
    from qcompiler.targets.target import Target

__all__ = [
    "Pipeline",
    "QCompilerError",
    "Recipe",
    "Report",
    "Target",
    "compile",
    "get_target",
    "load",
]

_HOME = {
    "Pipeline": "qcompiler.pipeline",
    "QCompilerError": "qcompiler.ir.errors",
    "Recipe": "qcompiler.recipe",
    "Report": "qcompiler.report",
    "Target": "qcompiler.targets.target",
    "compile": "qcompiler.driver",
    "get_target": "qcompiler.targets.catalog",
    "load": "qcompiler.runtime",
}


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
