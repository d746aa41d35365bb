"""The texts of a saved graph that torch evaluates: expressions of dynamic shapes, and names."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import sympy
import torch.utils._sympy.functions

from qcompiler.ir.errors import ModelError

__all__ = ["check_text"]

_NAME = re.compile(r"[\w.:/@$<>\[\]-]*")
"""A name that stays one in generated Python: no quote, parenthesis, space or end of line."""

_WORD = re.compile(r"[\w.+-]*")
"""A text inside an expression: a symbol's name, or the digits of a number."""

_SYNTAX = (
    ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.UnaryOp, ast.BinOp,
    ast.Compare, ast.operator, ast.unaryop, ast.cmpop,
)  # fmt: skip


def check_text(graph: Any, path: Path) -> None:
    """Refuse a saved graph whose expressions are more than arithmetic, or whose names are no names.

    Args:
        graph: The JSON of the program.
        path: Its file, for messages.

    Raises:
        ModelError: With the text that was refused.
    """
    stack = [graph]
    while stack:
        item = stack.pop()
        stack += item.values() if isinstance(item, dict) else item if isinstance(item, list) else []
        for key, text in item.items() if isinstance(item, dict) else ():
            if not isinstance(text, str):
                continue
            if key == "expr_str" and not _is_arithmetic(text):
                raise ModelError(f"{path}: {text[:80]!r} is no expression of a dimension; not read")
            named = key in ("name", "as_name") or key.endswith("_name")
            if named and not _NAME.fullmatch(text):
                raise ModelError(f"{path}: {text[:80]!r} is no name of a value; not read")


def _is_arithmetic(text: str) -> bool:
    """Whether the text calls nothing but sympy's and torch's constructors of expressions."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(_is_harmless(node) for node in ast.walk(tree))


def _is_harmless(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _WORD.fullmatch(node.value) is not None
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and _builds_expressions(node.func.id)
    return isinstance(node, _SYNTAX)


def _builds_expressions(name: str) -> bool:
    for module in (torch.utils._sympy.functions, sympy):
        found = getattr(module, name, None)
        if isinstance(found, type):
            return issubclass(found, sympy.Basic)
    return False
