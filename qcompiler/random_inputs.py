"""Inputs made up for a model, where nobody gave any: right in type and shape, always the same."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler.ir.errors import OptionError, did_you_mean

__all__ = ["SMALLEST_VOCABULARY", "Feed", "InputShape", "random_feed"]

Feed = dict[str, NDArray[Any]]

_MOST_VALUES = 1 << 26
"""An image of 4096 x 4096 in colour is smaller; six dynamic dimensions of 128 are not."""

SMALLEST_VOCABULARY = 100
"""Integers below this are token ids of any vocabulary of words."""


@dataclasses.dataclass(frozen=True)
class InputShape:
    """One input as it was fed.

    Attributes:
        name: Input name.
        dtype: Its numpy type.
        shape: Its shape.
        values: What it was filled with: "random", "ones", "zeros", "0, 1, 2, …" or "sample".
        assumed: Sizes of dynamic dimensions that nobody gave.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: str
    assumed: dict[str, int]


def random_feed(
    inputs: Sequence[Any],
    shapes: Mapping[str, tuple[int, ...]],
    limits: Mapping[str, int] | None = None,
) -> tuple[Feed, list[InputShape]]:
    """Values for each of `session.get_inputs()`, always the same ones.

    Floats are normal, integers below the limit given for their input, else below 100; names with
    "mask" get ones, "type" zeros and "position" 0, 1, 2, ....  A dynamic dimension takes the size
    it has in a given shape, else a default: for "past" the default is none at all.

    Raises:
        OptionError: An unknown input, a shape that does not fit, a type that cannot be made up.
    """
    names = [expected.name for expected in inputs]
    for name in shapes:
        if name not in names:
            hint = did_you_mean(name, names) or f"; the inputs are {', '.join(names)}"
            raise OptionError(f"shapes: the model has no input {name!r}{hint}")
    chosen, random = _choose_shapes(inputs, shapes), np.random.default_rng(0)
    feed, fed = Feed(), []
    for expected in inputs:
        shape, assumed = chosen[expected.name]
        if math.prod(shape) > _MOST_VALUES:
            sizes = "x".join(map(str, shape))
            smaller = "a smaller one" if expected.name in shapes else "its shape"
            raise OptionError(
                f"input {expected.name!r} of {sizes} is too large to make up, above "
                f"{_MOST_VALUES:,} values: give {smaller}"
            )
        kind = _kind(expected)
        limit = (limits or {}).get(expected.name, SMALLEST_VOCABULARY)
        array = _values(expected, kind, shape, random, limit)
        feed[expected.name] = array
        fed.append(InputShape(expected.name, str(array.dtype), shape, kind, assumed))
    return feed, fed


def _choose_shapes(
    inputs: Sequence[Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[tuple[int, ...], dict[str, int]]]:
    """A shape for each input, and the dimensions that were made up for it first."""
    sizes: dict[str, int] = {}
    for expected in inputs:
        if expected.name in shapes:
            sizes |= _sizes_in(expected, shapes[expected.name])
    chosen = dict[str, tuple[tuple[int, ...], dict[str, int]]]()
    # Sums of dimensions come last, when their terms are known.
    for expected in sorted(inputs, key=_has_sum):
        if expected.name in shapes:
            chosen[expected.name] = shapes[expected.name], {}
        else:
            chosen[expected.name] = _default_shape(expected, sizes)
            sizes |= chosen[expected.name][1]
    return chosen


def _has_sum(expected: Any) -> bool:
    return any(isinstance(dim, str) and len(_terms(dim)) > 1 for dim in expected.shape)


def _sizes_in(expected: Any, shape: tuple[int, ...]) -> dict[str, int]:
    """The size of each named dimension of an input, given its shape."""
    fits = len(shape) == len(expected.shape) and all(
        not isinstance(dim, int) or dim == size
        for dim, size in zip(expected.shape, shape, strict=True)
    )
    if not fits:
        raise OptionError(
            f"shapes: {expected.name}={'x'.join(map(str, shape))} does not fit, the model takes "
            f"{expected.shape}"
        )
    pairs = zip(expected.shape, shape, strict=True)
    return {dim: size for dim, size in pairs if isinstance(dim, str)}


def _default_shape(
    expected: Any, sizes: Mapping[str, int]
) -> tuple[tuple[int, ...], dict[str, int]]:
    """A shape for an input, and the named dimensions that had to be made up for it."""
    shape, assumed = list[int](), dict[str, int]()
    for axis, dim in enumerate(expected.shape):
        if isinstance(dim, int):
            shape.append(dim)
            continue
        name = dim or f"{expected.name}[{axis}]"
        size = _known_size(name, {**sizes, **assumed})
        if size is None:
            size = assumed[name] = _default_size(expected, axis)
        shape.append(size)
    return tuple(shape), assumed


def _known_size(name: str, sizes: Mapping[str, int]) -> int | None:
    """The size of a dimension called "seq", or "past + seq" as torch.export writes a sum."""
    if name in sizes:
        return sizes[name]
    parts = [int(part) if part.isdecimal() else sizes.get(part) for part in _terms(name)]
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _terms(name: str) -> list[str]:
    return [term.strip() for term in name.split("+")]


def _default_size(expected: Any, axis: int) -> int:
    """A batch of one that remembers nothing yet; sequences of 128; images of 224 x 224."""
    if axis == 0:
        return 1
    if "past" in expected.name.lower():
        return 0
    return 224 if len(expected.shape) == 4 else 128


def _kind(expected: Any) -> str:
    """What to fill an input with, from its name: most of a model's run time ignores values."""
    name = expected.name.lower()
    if "mask" in name or expected.type == "tensor(bool)":
        return "ones"
    if "int" in expected.type and "type" in name:
        return "zeros"
    if "int" in expected.type and "position" in name:
        return "0, 1, 2, …"
    return "random"


def _values(
    expected: Any, kind: str, shape: tuple[int, ...], random: np.random.Generator, limit: int
) -> NDArray[Any]:
    stored = expected.type.removeprefix("tensor(").removesuffix(")")
    stored = {"float": "float32", "double": "float64"}.get(stored, stored)
    try:
        dtype = np.dtype(stored)
    except TypeError:
        dtype = np.dtype(object)
    if dtype.kind not in "fiub":
        raise OptionError(
            f"cannot make up values for input {expected.name!r} of {expected.type}: "
            "give samples with --data DIR"
        )
    match kind:
        case "ones":
            return np.ones(shape, dtype)
        case "zeros":
            return np.zeros(shape, dtype)
        case "random" if dtype.kind == "f":
            return random.standard_normal(shape).astype(dtype)
        case "random":
            return random.integers(0, limit, shape).astype(dtype)
    return np.broadcast_to(np.arange(shape[-1] if shape else 1), shape).astype(dtype)
