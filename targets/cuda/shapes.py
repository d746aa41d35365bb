"""The shapes of kernels of products; `plan.py` says which a region gets."""

from __future__ import annotations

import dataclasses

__all__ = ["Channels", "Roles", "Shape", "Stream", "Tile"]


@dataclasses.dataclass(frozen=True)
class Stream:
    """The kernel for a few rows.

    Attributes:
        warps: That divide K.
        batch: Chunks whose loads are under way together in a warp.
    """

    warps: int
    batch: int


@dataclasses.dataclass(frozen=True)
class Tile:
    """A kernel for many rows.

    Attributes:
        rows: Of a block's tile.
        stages: Chunks in shared memory: one is multiplied while the others arrive.
        splits: Parts of K.
    """

    rows: int
    stages: int
    splits: int = 1


@dataclasses.dataclass(frozen=True)
class Roles:
    """A kernel for very many rows, whose threads have different roles (`roles.py`).

    Attributes:
        rows: Of a block's tile.
        stages: Chunks in shared memory.
    """

    rows: int
    stages: int
    splits: int = 1


@dataclasses.dataclass(frozen=True)
class Channels:
    """The kernel of a depthwise convolution (`depthwise.py`).

    Attributes:
        rows: Pixels of a block's tile.
    """

    rows: int
    splits: int = 1


Shape = Stream | Tile | Roles | Channels
