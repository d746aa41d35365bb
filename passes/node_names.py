"""What nodes are called, and which of them a pattern means.

Nodes that torch's exporter made, whose own names say little, also go by the module that they come
from: "encoder.layer.0.attention.self.query".
"""

from __future__ import annotations

import ast
import fnmatch
import functools
import re

import onnx_ir as ir

from qcompiler.ir.errors import OptionError

__all__ = ["check_pattern", "matches", "names_of"]

_SCOPES = "pkg.torch.onnx.name_scopes"
"""Where torch's exporter notes the modules that a node lies in, as a Python list of texts."""


def check_pattern(key: str, pattern: str) -> None:
    """Check a pattern of names.

    Raises:
        OptionError: It begins with "re:", and no regular expression follows.
    """
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            problem = f"{key} {pattern!r} is no regular expression: {error}"
            raise OptionError(problem) from None


def matches(name: str, pattern: str) -> bool:
    """As a regular expression, a shell pattern, or to the letter: node names may hold brackets."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def names_of(node: ir.Node) -> list[str]:
    """What a node may be called: its name, and the module of torch that it comes from."""
    module = _module(node.metadata_props.get(_SCOPES, ""))
    return [node.name or "", *([module] if module else [])]


@functools.lru_cache(maxsize=4096)
def _module(scopes: str) -> str:
    """The innermost module of a list of scopes; the last one is the op itself."""
    try:
        names = ast.literal_eval(scopes)
    except (SyntaxError, ValueError):
        return ""
    found = names[-2] if isinstance(names, list) and len(names) > 1 else ""
    return found if isinstance(found, str) else ""
