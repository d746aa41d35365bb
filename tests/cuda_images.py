"""Images, convolutions and their regions, for tests of the kernels of convolutions."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompiler.ir.dialect_image import padded_channels
from qcompiler.ir.region import Region, Step
from qcompiler.targets.cuda.image_plan import geometry

Array = NDArray[Any]
BIAS = (Step("Add", (0, -1)),)
RESIDUAL = (*BIAS, Step("Add", (1, -2)), Step("Relu", (2,)))


def pads_of(channels: int, border: tuple[int, int, int, int]) -> tuple[int, ...]:
    """As ONNX's Pad has them, of all axes of a stored image."""
    top, left, bottom, right = border
    return (0, top, left, 0, 0, bottom, right, padded_channels(channels) - channels)


@dataclasses.dataclass(frozen=True)
class Conv:
    """One convolution and how its image is padded: above, left, below, right."""

    channels: int
    columns: int
    kernel: tuple[int, int] = (3, 3)
    pads: tuple[int, int, int, int] = (1, 1, 1, 1)
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    steps: tuple[Step, ...] = ()
    flags: tuple[str, ...] = ()
    group: int = 1
    made: tuple[int, int, int, int] | None = None
    """The border of a result that is stored as an image."""
    outputs: tuple[str, ...] = ("made",)
    """Of such a one."""

    @property
    def region(self) -> Region:
        """That of the product."""
        sizes = (("K", self.channels), ("N", self.columns), *zip("RS", self.kernel, strict=True))
        count = sum(arg < 0 for step in self.steps for arg in step.args)
        attributes: list[Any] = [("dilations", self.dilations), ("group", self.group)]
        if self.made is not None:
            attributes.append(("pads", pads_of(self.columns, self.made)))
        attributes.append(("strides", self.strides))
        return Region(
            "QConvW8A8" if self.made is None else "QConvImageW8A8", sizes,
            ("channel", "tensor")[:count], self.steps, flags=self.flags,
            outputs=() if self.made is None else self.outputs, attributes=tuple(attributes),
        )  # fmt: skip

    @property
    def image(self) -> Region:
        """That of its activations."""
        pads = pads_of(self.channels, self.pads)
        return Region(
            "QuantizeImage", (("K", self.channels),), flags=self.flags, attributes=(("pads", pads),)
        )

    def stored(self, shape: tuple[int, int, int]) -> tuple[int, int, int, int]:
        """The shape of q for so many images of so many pixels."""
        top, left, bottom, right = self.pads
        count, height, width = shape
        return count, height + top + bottom, width + left + right, padded_channels(self.channels)

    def result(self, shape: tuple[int, int, int]) -> tuple[int, int, int, int]:
        """The shape of y."""
        count, *sizes, _ = self.stored(shape)
        known = geometry(self.region)
        height, width = (
            (size - span) // stride + 1
            for size, span, stride in zip(sizes, known.spans, known.strides, strict=True)
        )
        return count, self.columns, height, width

    def result_image(self, shape: tuple[int, int, int]) -> tuple[int, int, int, int]:
        """The shape of the result that is stored as an image."""
        assert self.made is not None
        top, left, bottom, right = self.made
        count, columns, height, width = self.result(shape)
        return count, height + top + bottom, width + left + right, padded_channels(columns)

    def operands(self, shape: tuple[int, int, int], seed: int = 0) -> dict[str, Array]:
        """x, s, z, w, ws, and extra operands, floats as float16 holds them."""
        rng, count = np.random.default_rng(seed), shape[0]
        x = rng.standard_normal((count, self.channels, *shape[1:])) * 2 + 1
        found: dict[str, Array] = {
            "x": x.astype(np.float16),
            "s": np.float32(0.03),
            "z": np.uint8(rng.integers(40, 200)),
            "w": rng.integers(
                -128, 128, (self.columns, self.channels // self.group, *self.kernel)
            ).astype("i1"),
            "ws": (rng.random(self.columns) * 0.02 + 0.002).astype(np.float32),
        }
        if self.made is not None:
            taps = self.channels // self.group * np.prod(self.kernel)
            found |= {"t": np.float32(0.01 * taps**0.5), "u": np.uint8(rng.integers(40, 200))}
        shapes = {"extra0": (self.columns, 1, 1), "extra1": self.result(shape)}
        for i in range(len(self.region.extras)):
            name = f"extra{i}"
            found[name] = rng.standard_normal(shapes[name]).astype(np.float16)
        return found
