"""The recipe: a user's whole intent beside the model and the target, as data and as TOML."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qcompiler.bundle import MANIFEST, Manifest
from qcompiler.clipping import Clipping
from qcompiler.ir.errors import OptionError, cannot_read, did_you_mean
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.convert_float16 import check_float_type
from qcompiler.passes.fuse_attention import FuseAttention
from qcompiler.passes.node_rules import NodeRule

__all__ = ["Recipe"]

_RECIPES = "a TOML file, or a bundle for the recipe that it was made by"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What to do differently from a target's defaults; docs/recipes.md has examples.

    Attributes:
        keep_float: Node names, op types, or shell patterns of either, that are not quantized,
            whatever rules say of them.
        group_size: Weights per scale for int4 targets, 0 for one scale per channel; by default the
            target's own choice.
        attention: What attention may round the factors of both its products to, where kernels and
            the processor multiply those: "int8" (x86: AVX512-VNNI), good to 30 to 40 dB, "bfloat16"
            (AVX512-BF16), good to 45, or "float32".  By default int8 where queries, keys and values
            are results of int8 products, which are no better themselves, unless outlying channels
            of those are multiplied in float.
        float: What the part of a model that is not quantized computes in: "fp16" or "fp32"; by
            default fp16 on CUDA, and fp32 elsewhere, see `passes/convert_float16.py`.
        smooth: Divide the outlying channels of activations before they are quantized, and multiply
            the weights that read them instead, see `passes/smooth_activations.py`.
        calibration: Where static ranges are cut off: "min-max", "moving-average", "percentile",
            "entropy", "mse" or "sigma", some with an amount: "percentile=99.9"; see
            `qcompiler/clipping.py`.
        rounding: How the weights of products are rounded: "nearest", "hqq", or, with samples,
            "awq", "gptq" or both, "awq_gptq".
        zero_points: Of groups of int4 weights: "none", "integer" or "float"; by default the
            target's own choice.
        scales: Of groups of int4 weights, and their float zero points: "float", or "int8" times a
            float per channel.
        nodes: Rules about single nodes, see `NodeRule`: later ones win, key by key.
        passes: Options of passes, by the pipeline's name of the pass and their own; docs/passes.md
            has them all.
        source: Where it was read, for messages; no key of a file, and of no matter to equality.
    """

    keep_float: tuple[str, ...] = ()
    group_size: int | None = None
    attention: str | None = None
    float: str | None = None
    smooth: bool = True
    calibration: str = "mse"
    rounding: str = "nearest"
    zero_points: str | None = None
    scales: str = "float"
    nodes: tuple[NodeRule, ...] = ()
    passes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict, hash=False)
    source: str = dataclasses.field(default="recipe", compare=False, repr=False)

    @classmethod
    def names_of_keys(cls) -> list[str]:
        """What a file may say."""
        return [field.name for field in dataclasses.fields(cls) if field.compare]

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            OptionError: Patterns that are no strings, a group size that is no power of two from 16
                to 256 and not 0, an attention that is none of the three, a float that is neither
                of both, or rules or passes that are none.
        """
        AssignPrecision.Options(
            self.keep_float,
            self.group_size,
            rounding=self.rounding,
            zero_points=self.zero_points,
            scales=self.scales,
        )
        FuseAttention.Options(self.attention)
        Clipping.parse(self.calibration)
        if self.float is not None:
            check_float_type(self.float)
        if not isinstance(self.smooth, bool):
            raise OptionError(f"smooth must be true or false, not {self.smooth!r}")
        object.__setattr__(self, "keep_float", tuple(self.keep_float))
        object.__setattr__(self, "nodes", _rules(self.nodes))
        object.__setattr__(self, "passes", _options(self.passes))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a TOML file, or the recipe that a bundle was made by.

        Args:
            path: The file; or the bundle, or its manifest.

        Raises:
            OptionError: It is missing, not TOML, or has an unknown key or a wrong type.
            BundleError: A folder that is no bundle.
        """
        given = Path(path)
        if given.is_dir() or given.name == MANIFEST:
            folder = given if given.is_dir() else given.parent
            return cls.from_dict(Manifest.read(folder).recipe, str(path))
        try:
            content = tomllib.loads(given.read_text(encoding="utf-8"))
        except OSError as error:
            raise OptionError(cannot_read("recipe", path, error, _RECIPES)) from error
        except UnicodeDecodeError as error:
            raise OptionError(f"{path} is not a text file: {error}") from error
        except tomllib.TOMLDecodeError as error:
            raise OptionError(f"{path} is not TOML: {error}") from error
        return cls.from_dict(content, str(path))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str = "recipe") -> Recipe:
        """Build from plain values, as in a TOML file or a manifest.

        Raises:
            OptionError: An unknown key or a wrong type.
        """
        known = cls.names_of_keys()
        for key in content:
            if key not in known:
                hint = did_you_mean(key, known) or f"; the keys are {', '.join(known)}"
                raise OptionError(f"{source}: unknown key {key!r}{hint}")
        try:
            return cls(**content, source=source)
        except OptionError as error:
            raise OptionError(f"{source}: {error}") from error

    def to_toml(self) -> str:
        """A TOML file that `read` reads back."""
        content = self.to_dict()
        rules, passes = content.pop("nodes", []), content.pop("passes", {})
        tables = [("", content), *(("[[nodes]]", rule) for rule in rules)]
        tables += [(f"[passes.{_key(name)}]", options) for name, options in passes.items()]
        return "\n".join(_table(head, values) for head, values in tables)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` takes; unset ones are left out."""
        content: dict[str, Any] = {
            "keep_float": list(self.keep_float),
            "group_size": self.group_size,
            "attention": self.attention,
            "float": self.float,
            "smooth": self.smooth,
            "calibration": self.calibration,
            "rounding": self.rounding,
            "zero_points": self.zero_points,
            "scales": self.scales if self.scales != "float" else None,
            "nodes": [rule.to_dict() for rule in self.nodes] or None,
            "passes": {name: _plain(options) for name, options in self.passes.items()} or None,
        }
        return {key: value for key, value in content.items() if value is not None}


def _rules(given: Any) -> tuple[NodeRule, ...]:
    """The rules, read where they are plain values.

    Raises:
        OptionError: Names the rule, and what is wrong with it.
    """
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise OptionError(f"nodes must be a list of rules, [[nodes]] in TOML, not {given!r}")
    rules = []
    for index, content in enumerate(given):
        try:
            rule = content if isinstance(content, NodeRule) else NodeRule.from_dict(content)
            if rule.calibration is not None:
                Clipping.parse(rule.calibration)
        except OptionError as error:
            raise OptionError(f"rule {index + 1} of nodes: {error}") from error
        rules.append(rule)
    return tuple(rules)


def _options(passes: Any) -> dict[str, dict[str, Any]]:
    """Options per pass, lists as the tuples that they are in Python; None is as if not given.

    Raises:
        OptionError: They are no tables.
    """
    if not isinstance(passes, Mapping):
        raise OptionError(f"passes must be tables, [passes.NAME] in TOML, not {passes!r}")
    for name, options in passes.items():
        if not isinstance(options, Mapping):
            raise OptionError(
                f"passes: {name} must be a table of options, [passes.{name}] in TOML, not "
                f"{options!r}"
            )
    return {
        name: {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in options.items()
            if value is not None
        }
        for name, options in passes.items()
    }


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as TOML and JSON have them."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}


def _table(head: str, values: Mapping[str, Any]) -> str:
    lines = [head] if head else []
    lines += [f"{key} = {_text(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _text(name)


def _text(value: Any) -> str:
    """A value as TOML: JSON's texts, lists, numbers and booleans are, but for two letters.

    JSON writes what lies outside of 16 bits as two surrogates, and DEL as it is.
    """
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
