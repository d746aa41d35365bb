"""Options of passes: read from text, and described by their docstrings.

A pass that a user may tell something takes a frozen dataclass and keeps it as `self.options`; what
else it needs (a scheme, a predicate, samples) are facts, which the pipeline gives it.

    @dataclasses.dataclass(frozen=True)
    class Options:
        alpha: float = 0.5

    def __init__(self, options: Options | None = None) -> None:
        super().__init__()
        self.options = options or self.Options()

In a pipeline's text that is `my-pass{alpha=0.6}`.  Fields are of type bool, int, float or str, or a
tuple of one of these, any of them `| None`; the docstring's section Attributes explains them.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from qcompiler.ir.errors import OptionError, did_you_mean

__all__ = ["PassOption", "configured", "options_of"]

_SWITCH = {"true": True, "false": False}
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclasses.dataclass(frozen=True)
class PassOption:
    """One option of a pass.

    Attributes:
        name: As it is written in a pipeline.
        type: "number", "numbers", ...: what may be written for it.
        default: The value it has now, as it would be written; empty for None and for an empty list.
        help: What the docstring says of it.
    """

    name: str
    type: str
    default: str
    help: str


def options_of(rewrite: ir.passes.PassBase) -> list[PassOption]:
    """The options of a pass, in order; none unless it keeps a dataclass as `options`."""
    options = getattr(rewrite, "options", None)
    if options is None:
        return []
    hints, documented = typing.get_type_hints(type(options)), _attribute_docs(type(options))
    return [
        PassOption(
            field.name,
            _in_words(hints[field.name]),
            _written(getattr(options, field.name)),
            documented.get(field.name, ""),
        )
        for field in dataclasses.fields(options)
    ]


def configured(
    rewrite: ir.passes.PassBase, name: str, values: Mapping[str, Sequence[str] | Any]
) -> ir.passes.PassBase:
    """A copy of the pass with other options.

    Args:
        rewrite: The pass; it is not changed.
        name: What the pipeline calls it, for messages.
        values: By option; a list of texts is read as the field's type, all else must be of it.

    Raises:
        OptionError: No such option, or a value that it does not take.
    """
    known = [option.name for option in options_of(rewrite)]
    for key in values:
        if key not in known:
            hint = did_you_mean(key, known) or (
                f"; it has {', '.join(known)}" if known else ", and no others: leave it out"
            )
            raise OptionError(f"{name} has no option {key!r}{hint}")
    if not values:
        return rewrite
    changed: Any = copy.copy(rewrite)
    hints = typing.get_type_hints(type(changed.options))
    read = {key: _given(value, hints[key], f"{name}: {key}") for key, value in values.items()}
    try:
        changed.options = dataclasses.replace(changed.options, **read)
    except OptionError as error:
        raise OptionError(f"{name}: {error}") from error
    return typing.cast(ir.passes.PassBase, changed)


def _given(value: Any, hint: Any, where: str) -> Any:
    """A value as its field has it: a text that is read, or Python's, one for a tuple too."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return _read(value, hint, where)
    kind, many = _kind(hint)
    if value is None and types.NoneType in typing.get_args(hint):
        return None
    items = tuple(value) if many and isinstance(value, list | tuple) else (value,)
    for item in items:
        fits = isinstance(item, kind) or (kind is float and isinstance(item, int))
        if not fits or (isinstance(item, bool) and kind is not bool):
            raise OptionError(f"{where} takes {_KINDS[kind]}, not {item!r}")
    return items if many else value


def _read(texts: list[str], hint: Any, where: str) -> Any:
    kind, many = _kind(hint)
    if many:
        return tuple(_read_one(text, kind, where) for text in texts)
    if len(texts) != 1:
        raise OptionError(f"{where} takes one value, not {', '.join(texts) or 'none'}")
    return _read_one(texts[0], kind, where)


def _read_one(text: str, kind: type, where: str) -> Any:
    try:
        value = _SWITCH[text] if kind is bool else kind(text)
    except (KeyError, ValueError):
        value = math.nan
    if not text or value != value or value in (math.inf, -math.inf):
        raise OptionError(f"{where} takes {_KINDS[kind]}, not {text!r}")
    return value


def _kind(hint: Any) -> tuple[type, bool]:
    """The type of one value, and whether there may be several."""
    if isinstance(hint, types.UnionType):
        (hint,) = [part for part in typing.get_args(hint) if part is not types.NoneType]
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def _in_words(hint: Any) -> str:
    kind, many = _kind(hint)
    word = {bool: "true|false", int: "integer", float: "number", str: "text"}[kind]
    return f"{word},…" if many else word


def _written(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _attribute_docs(options: type) -> dict[str, str]:
    """What the section "Attributes" of a docstring says of each."""
    _, _, section = (inspect.getdoc(options) or "").partition("Attributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}
