"""Inputs made up for a model, where nobody gave any: right in type and shape, always the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler.ir.errors import OptionError, did_you_mean

__all__ = ["Feed", "InputShape", "random_feed"]

Feed = dict[str, NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class InputShape:
    """One input as it was fed; `assumed` names the dynamic dimensions nobody gave a size for."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    assumed: dict[str, int]


def random_feed(
    inputs: Sequence[Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Feed, list[InputShape]]:
    """Values for each of `session.get_inputs()`, always the same ones.

    Floats are normal, integers below 100; names with "mask" get ones, "type" zeros and "position"
    0, 1, 2, ....  A dynamic dimension takes the size it has in a given shape, else a default.

    Raises:
        OptionError: An unknown input, a shape that does not fit, a type that cannot be made up.
    """
    names = [expected.name for expected in inputs]
    for name in shapes:
        if name not in names:
            hint = did_you_mean(name, names) or f"; the inputs are {', '.join(names)}"
            raise OptionError(f"shapes: the model has no input {name!r}{hint}")
    sizes: dict[str, int] = {}
    for expected in inputs:
        if expected.name in shapes:
            sizes |= _sizes_in(expected, shapes[expected.name])
    random = np.random.default_rng(0)
    feed, fed = Feed(), []
    for expected in inputs:
        shape, assumed = shapes.get(expected.name), dict[str, int]()
        if shape is None:
            shape, assumed = _default_shape(expected, sizes)
            sizes |= assumed
        array = _values(expected, shape, random)
        feed[expected.name] = array
        fed.append(InputShape(expected.name, str(array.dtype), shape, assumed))
    return feed, fed


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
    shape, assumed = [], {}
    rank = len(expected.shape)
    for axis, dim in enumerate(expected.shape):
        if isinstance(dim, int):
            shape.append(dim)
            continue
        name = dim or f"{expected.name}[{axis}]"
        known = sizes.get(name, assumed.get(name))
        # A batch of one; images of 224 x 224; sequences of 128.
        size = known if known is not None else 1 if axis == 0 else 224 if rank == 4 else 128
        if known is None:
            assumed[name] = size
        shape.append(size)
    return tuple(shape), assumed


def _values(expected: Any, shape: tuple[int, ...], random: np.random.Generator) -> NDArray[Any]:
    kind = expected.type.removeprefix("tensor(").removesuffix(")")
    name = expected.name.lower()
    if kind in ("float", "float16", "double"):
        dtype = {"float": "float32", "double": "float64"}.get(kind, kind)
        values = np.ones(shape) if "mask" in name else random.standard_normal(shape)
        return values.astype(dtype)
    if kind == "bool":
        return np.ones(shape, bool)
    if not kind.removeprefix("u").startswith("int"):
        raise OptionError(f"cannot make up values for input {expected.name!r} of {expected.type}: "
                          "give samples with --data DIR")  # fmt: skip
    if "mask" in name:
        return np.ones(shape, kind)
    if "type" in name:
        return np.zeros(shape, kind)
    if "position" in name:
        return np.broadcast_to(np.arange(shape[-1] if shape else 1), shape).astype(kind)
    return random.integers(0, 100, shape).astype(kind)
