"""Which elements of a tensor share a scale."""

from __future__ import annotations

import dataclasses
import operator
import re

from qcompiler.ir.errors import OptionError

__all__ = ["Granularity", "PerAxis", "PerGroup", "PerTensor", "parse_granularity"]

_Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""

    def scale_shape(self, shape: _Shape) -> _Shape:
        """The shape of the scales of a tensor of that shape, as ONNX stores them."""
        return ()

    def __str__(self) -> str:
        return "tensor"


@dataclasses.dataclass(frozen=True)
class PerAxis:
    """One scale per slice along `axis` ("per channel").

    Raises:
        OptionError: The axis is no whole number.
    """

    axis: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "axis", _whole(self.axis, "axis"))

    def scale_shape(self, shape: _Shape) -> _Shape:
        """The shape of the scales of a tensor of that shape, as ONNX stores them."""
        return (shape[_checked_axis(self.axis, shape)],)

    def __str__(self) -> str:
        return f"axis={self.axis}"


@dataclasses.dataclass(frozen=True)
class PerGroup:
    """One scale per `group_size` neighbours along `axis` (`block_size` at the ONNX border).

    The last group may be shorter.  A dynamic scale over whole rows, "per token", is
    `PerGroup(-1, K)`.

    Raises:
        OptionError: The axis is no whole number, or the group size none from 1 on.
    """

    axis: int
    group_size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "axis", _whole(self.axis, "axis"))
        object.__setattr__(self, "group_size", _whole(self.group_size, "group size"))
        if self.group_size < 1:
            raise OptionError(f"group size {self.group_size}: a group has 1 element or more")

    def scale_shape(self, shape: _Shape) -> _Shape:
        """The shape of the scales of a tensor of that shape, as ONNX stores them."""
        axis = _checked_axis(self.axis, shape)
        return (*shape[:axis], -(-shape[axis] // self.group_size), *shape[axis + 1 :])

    def __str__(self) -> str:
        return f"axis={self.axis}/{self.group_size}"


Granularity = PerTensor | PerAxis | PerGroup


def _whole(number: object, what: str) -> int:
    """A whole number, also one of numpy, which would print as something that does not parse."""
    if isinstance(number, bool) or not hasattr(number, "__index__"):
        raise OptionError(f"{what} {number!r}: it is a whole number")
    return operator.index(number)


def _checked_axis(axis: int, shape: _Shape) -> int:
    """`axis` counted from the front."""
    if not -len(shape) <= axis < len(shape):
        raise OptionError(f"axis {axis} of a tensor of shape {list(shape)} does not exist")
    return axis % len(shape)


def parse_granularity(text: str) -> Granularity:
    """The granularity that `str` wrote: `tensor`, `axis=1` or `axis=0/32`.

    Raises:
        OptionError: It is none of these.
    """
    if not isinstance(text, str):
        raise OptionError(f"no granularity {text!r}: write tensor, axis=1 or axis=0/32")
    if text == "tensor":
        return PerTensor()
    match = re.fullmatch(r"axis=(-?\d+)(?:/(\d+))?", text)
    if match is None:
        raise OptionError(f"no granularity {text!r}: write tensor, axis=1 or axis=0/32")
    axis = int(match[1])
    return PerAxis(axis) if match[2] is None else PerGroup(axis, int(match[2]))
