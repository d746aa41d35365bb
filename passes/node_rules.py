"""What a recipe says of single nodes: rules, of which later ones win, key by key.

    [[nodes]]
    match = "/encoder/layer.0/*"
    op = "MatMul"
    precision = "int8"

A rule is about the nodes whose name and op type both fit; what it leaves out, it has no say in.
What a name may be, and which patterns fit it, says `node_names`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from qcompiler.ir.errors import OptionError, did_you_mean
from qcompiler.passes.node_names import check_pattern, matches, names_of

__all__ = [
    "ACTIVATIONS",
    "FEWER_BITS",
    "GROUP_SIZES",
    "PRECISIONS",
    "ROUNDINGS",
    "ZERO_POINTS",
    "NodeRule",
    "NodeRules",
    "check_group_size",
    "check_word",
]

PRECISIONS = {
    "float": None,
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
    "int3": ir.DataType.INT4,
    "int2": ir.DataType.INT4,
    "fp8": ir.DataType.FLOAT8E4M3FN,
}
"""How weights may be stored, by the word of a recipe."""

FEWER_BITS = {"int3": 3, "int2": 2}
"""Of the bits that those are stored in: ONNX has no int3, and int2 only from opset 25."""

ACTIVATIONS = ("dynamic", "static", "float")

ROUNDINGS = ("nearest", "hqq", "awq", "gptq", "awq_gptq")
"""How weights may be rounded: by the pass of that name, or scaled by awq and rounded by gptq."""

GROUP_SIZES = (16, 32, 64, 128, 256)
"""ORT's MatMulNBits, which runs the bodies, takes powers of two from 16."""

SCALES = ("float", "int8")
"""How the scales of groups may be stored: each a float, or int8 times a float per channel."""

ZERO_POINTS = ("none", "integer", "float")
"""Whether groups of int4 weights have zero points, and of what: float ones are offsets."""

_WORDS = {
    "precision": tuple(PRECISIONS),
    "zero_points": ZERO_POINTS,
    "scales": SCALES,
    "activation": ACTIVATIONS,
    "rounding": ROUNDINGS,
}
_TEXTS = ("match", "op", "calibration", *_WORDS)


@dataclasses.dataclass(frozen=True)
class NodeRule:
    """What some nodes are to be; None leaves it to earlier rules, or to the target.

    Attributes:
        match: The nodes' names, or torch's names of their modules: one of them, a shell pattern, or
            "re:" and a regular expression for all of a name.  By default any.
        op: Their op type, or a shell pattern.  By default any.
        precision: How weights are stored: "float" (not quantized at all), "int8", "int4", "fp8",
            or "int3" and "int2", which are int4 with fewer steps.
        group_size: Weights per scale, in groups; 0 for one scale per channel.
        zero_points: "integer" or "float" ones let the groups of int4 weights lie off 0, "integer"
            ones those of int8 weights as well.
        scales: How scales of groups are stored: "float", or "int8", times a float per channel; and
            float zero points as well.
        activation: Scales of activations: "dynamic" (per token, computed while the model runs),
            "static" (per tensor, from calibration), or "float" (not quantized).
        calibration: Where static ranges are cut off, as the recipe's own key says for all nodes.
        rounding: How the weights of products are rounded: one of `ROUNDINGS`.
    """

    match: str | None = None
    op: str | None = None
    precision: str | None = None
    group_size: int | None = None
    zero_points: str | None = None
    scales: str | None = None
    activation: str | None = None
    calibration: str | None = None
    rounding: str | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            OptionError: A value of another type or none of its words, no regular expression, or a
                rule that says nothing.
        """
        for key in _TEXTS:
            value = getattr(self, key)
            if value is not None and (not isinstance(value, str) or not value):
                raise OptionError(f"{key} must be a text, not {value!r}")
        for key in _WORDS:
            if (value := getattr(self, key)) is not None:
                check_word(key, value)
        check_group_size(self.group_size)
        if self.match is not None:
            check_pattern("match", self.match)
        if not self.says:
            raise OptionError(f"it says nothing of the nodes: give {', '.join(_saying())}")

    @classmethod
    def from_dict(cls, content: Any) -> NodeRule:
        """Build from plain values, as in a TOML file.

        Raises:
            OptionError: No table, an unknown key, or a value that it does not take.
        """
        if not isinstance(content, Mapping):
            raise OptionError(f"must be a table, not {content!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in content:
            if key not in known:
                hint = did_you_mean(key, known) or f"; the keys are {', '.join(known)}"
                raise OptionError(f"unknown key {key!r}{hint}")
        return cls(**content)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` takes."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}

    @property
    def says(self) -> list[str]:
        """The keys that say what the nodes are to be."""
        return [key for key in _saying() if getattr(self, key) is not None]

    def is_about(self, node: ir.Node) -> bool:
        """Whether name and op type fit."""
        if self.op is not None and not matches(node.op_type, self.op):
            return False
        names, wanted = names_of(node), self.match
        if wanted is None or any(matches(name, wanted) for name in names):
            return True
        # "a + b" is what reports call products that were merged: both are meant.
        return any(matches(name, part) for name in names for part in wanted.split(" + "))

    def __str__(self) -> str:
        where = [f"{key} {value!r}" for key in ("match", "op") if (value := getattr(self, key))]
        return " and ".join(where) or "of all nodes"


class NodeRules:
    """The rules of a recipe, about the nodes of one model.

    Raises:
        OptionError: A rule that is about no node.
    """

    def __init__(self, rules: Sequence[NodeRule], nodes: Sequence[ir.Node]) -> None:
        self._rules = rules
        self._asked: dict[ir.Node, dict[str, int]] = {}
        self._refused: dict[tuple[ir.Node, str], str] = {}
        for index, rule in enumerate(rules):
            found = [node for node in nodes if rule.is_about(node)]
            if not found:
                raise OptionError(f"{self._label(index)} {_why_none(rule, nodes)}")
            for node in found:
                self._asked.setdefault(node, {}).update(dict.fromkeys(rule.says, index))

    def about(self, node: ir.Node) -> NodeRule | None:
        """What they say of a node, as one rule; None if that is nothing."""
        asked = self._asked.get(node)
        if asked is None:
            return None
        return NodeRule(**{key: getattr(self._rules[i], key) for key, i in asked.items()})

    def overrule(self, node: ir.Node) -> None:
        """Forget what they say of a node: `keep_float` says otherwise."""
        self._asked.pop(node, None)

    def refuse(self, node: ir.Node, key: str, why: str) -> None:
        """Say that a node cannot be what a key asks for."""
        self._refused[node, key] = why

    def check(self) -> tuple[str, ...]:
        """Check that every rule was of use.

        Returns:
            What the user should know: rules that later ones overrule altogether.

        Raises:
            OptionError: A key of a rule that none of its nodes can follow.
        """
        notes = []
        for index, rule in enumerate(self._rules):
            told = {
                key: [node for node, asked in self._asked.items() if asked.get(key) == index]
                for key in rule.says
            }
            for key, nodes in told.items():
                reasons = [self._refused.get((node, key)) for node in nodes]
                if nodes and None not in reasons:
                    raise OptionError(
                        f"{self._label(index)}: {key} {getattr(rule, key)!r} is possible for none "
                        f"of its {len(nodes)} nodes: {nodes[0].name!r}: {reasons[0]}"
                    )
            if not any(told.values()):
                notes.append(f"{self._label(index)} has no effect: what comes later overrules it")
        return tuple(notes)

    def _label(self, index: int) -> str:
        return f"recipe: rule {index + 1} ({self._rules[index]})"


def check_group_size(size: Any) -> None:
    """Refuse a number of weights per scale that no op has.

    Raises:
        OptionError: It is no power of two from 16 to 256, and not 0.
    """
    if size is not None and (type(size) is not int or size not in (0, *GROUP_SIZES)):
        *first, last = map(str, GROUP_SIZES)
        raise OptionError(
            f"group_size {size!r}: must be {', '.join(first)} or {last}, or 0 for one per channel"
        )


def check_word(key: str, value: Any) -> None:
    """Refuse what is none of the words that a key takes.

    Raises:
        OptionError: Lists them.
    """
    words = _WORDS[key]
    if value not in words:
        hint = did_you_mean(str(value), words) or f"; one of {', '.join(words)}"
        raise OptionError(f"unknown {key} {value!r}{hint}")


def _saying() -> list[str]:
    names = [field.name for field in dataclasses.fields(NodeRule)]
    return [name for name in names if name not in ("match", "op")]


def _why_none(rule: NodeRule, nodes: Iterable[ir.Node]) -> str:
    names = {name for node in nodes for name in names_of(node)}
    ops = sorted({node.op_type for node in nodes})
    if rule.op is not None and not any(matches(op, rule.op) for op in ops):
        hint = did_you_mean(rule.op, ops)
        return f"is about no node: the model has no op {rule.op!r}{hint}"
    by_name = dataclasses.replace(rule, op=None)
    if rule.match is not None and not any(by_name.is_about(node) for node in nodes):
        hint = did_you_mean(rule.match, sorted(names))
        return f"is about no node: no name of the model fits {rule.match!r}{hint}"
    return "is about no node: none has such a name and is such an op"
