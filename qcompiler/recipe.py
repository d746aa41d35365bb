"""The recipe: a user's whole intent beside the model and the target, as data and as TOML."""

from __future__ import annotations

import dataclasses
import json
import os
import tomllib
from pathlib import Path
from typing import Any

from qcompiler.arguments import require
from qcompiler.clipping import Clipping
from qcompiler.ir.errors import OptionError, did_you_mean
from qcompiler.passes.assign_precision import AssignPrecision
from qcompiler.passes.fuse_attention import FuseAttention

__all__ = ["Recipe"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What to do differently from a target's defaults.

    Attributes:
        keep_float: Node names, op types, or shell patterns of either, that are not quantized.
        group_size: Weights per scale for int4 targets; by default the target's own choice.
        attention: What attention may round the factors of both its products to, where kernels and
            the processor multiply those: "int8" (x86: AVX512-VNNI), good to 30 to 40 dB, "bfloat16"
            (AVX512-BF16), good to 45, or "float32".  By default int8 where queries, keys and values
            are results of int8 products, which are no better themselves.
        smooth: Divide the outlying channels of norms before they are quantized, and multiply the
            weights that read them instead, see `passes/smooth_activations.py`.
        calibration: Where static ranges are cut off: "min-max", "moving-average", "percentile",
            "entropy", "mse" or "sigma", some with an amount: "percentile=99.9"; see
            `qcompiler/clipping.py`.
    """

    keep_float: tuple[str, ...] = ()
    group_size: int | None = None
    attention: str | None = None
    smooth: bool = True
    calibration: str = "mse"

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            OptionError: Patterns that are no strings, a group size that is no power of two from 16
                to 256, or an attention that is none of the three.
        """
        AssignPrecision.Options(self.keep_float, self.group_size)
        FuseAttention.Options(self.attention)
        Clipping.parse(self.calibration)
        require("smooth", self.smooth, bool, "true or false")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a TOML file.

        Raises:
            OptionError: It is missing, not TOML, or has an unknown key or a wrong type.
        """
        try:
            content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise OptionError(f"cannot read the recipe {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise OptionError(f"{path} is not a text file: {error}") from error
        except tomllib.TOMLDecodeError as error:
            raise OptionError(f"{path} is not TOML: {error}") from error
        return cls.from_dict(content, str(path))

    @classmethod
    def from_dict(cls, content: dict[str, Any], source: str = "recipe") -> Recipe:
        """Build from plain values, as in a TOML file or a manifest.

        Raises:
            OptionError: An unknown key or a wrong type.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in content:
            if key not in known:
                raise OptionError(f"{source}: unknown key {key!r}{did_you_mean(key, known)}")
        keep, size = content.get("keep_float", []), content.get("group_size")
        if not isinstance(keep, list) or not all(isinstance(item, str) for item in keep):
            raise OptionError(f"{source}: keep_float must be a list of strings, not {keep!r}")
        if size is not None and (not isinstance(size, int) or isinstance(size, bool)):
            raise OptionError(f"{source}: group_size must be an integer, not {size!r}")
        smooth = content.get("smooth", True)
        if not isinstance(smooth, bool):
            raise OptionError(f"{source}: smooth must be true or false, not {smooth!r}")
        calibration = content.get("calibration", cls.calibration)
        return cls(tuple(keep), size, content.get("attention"), smooth, calibration)

    def to_toml(self) -> str:
        """A TOML file that `read` reads back."""
        # JSON's texts, lists, numbers and booleans are TOML's as well.
        lines = [f"{key} = {json.dumps(value)}" for key, value in self.to_dict().items()]
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` takes; unset ones are left out."""
        content: dict[str, Any] = {"keep_float": list(self.keep_float)}
        content |= {} if self.group_size is None else {"group_size": self.group_size}
        content |= {} if self.attention is None else {"attention": self.attention}
        content |= {} if self.smooth else {"smooth": False}
        default = self.calibration == type(self).calibration
        return content | ({} if default else {"calibration": self.calibration})
