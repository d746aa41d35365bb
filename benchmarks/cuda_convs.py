"""Random convolutions for the kernels, and how far their results are off; part of `cuda.py`."""

from __future__ import annotations

import dataclasses

import numpy as np
from cuda_device import Array, Kernels

from qcompiler.ir.dialect_image import padded_channels
from qcompiler.ir.region import HALF, Region, Step
from qcompiler.targets.cuda.image_plan import geometry
from qcompiler.targets.cuda.packing import conv_matrix, pack, pack_scales

__all__ = ["Conv", "ConvProblem", "convs_to_check"]

_BIAS_RELU = (Step("Add", (0, -1)), Step("Relu", (1,)))
_RESIDUAL = (Step("Add", (0, -1)), Step("Add", (1, -2)), Step("Relu", (2,)))
_CHECKED = 64
"""Results that are compared."""


@dataclasses.dataclass(frozen=True)
class Conv:
    """One convolution of square images, its strides and dilations alike on both axes."""

    channels: int
    columns: int
    taps: int = 3
    pad: int = 1
    stride: int = 1
    dilation: int = 1
    steps: tuple[Step, ...] = _BIAS_RELU

    @property
    def region(self) -> Region:
        """That of the product."""
        sizes = (("K", self.channels), ("N", self.columns), ("R", self.taps), ("S", self.taps))
        count = 2 if self.steps == _RESIDUAL else len(self.steps[:1])
        steps = (("dilations", (self.dilation,) * 2), ("strides", (self.stride,) * 2))
        return Region(
            "QConvW8A8", sizes, ("channel", "tensor")[:count], self.steps,
            attributes=steps, flags=(HALF,),
        )  # fmt: skip

    @property
    def image(self) -> Region:
        """That of its activations."""
        more = padded_channels(self.channels) - self.channels
        pads = (0, self.pad, self.pad, 0, 0, self.pad, self.pad, more)
        return Region(
            "QuantizeImage", (("K", self.channels),), attributes=(("pads", pads),), flags=(HALF,)
        )


def convs_to_check(small: bool) -> list[tuple[Conv, tuple[int, int, int]]]:
    """With the images: odd sizes, borders, strides, dilations, K in splits, many pixels."""
    found = [
        (Conv(20, 40), (2, 9, 7)),
        (Conv(64, 136, taps=1, pad=0, stride=2, steps=()), (3, 9, 9)),
        (Conv(160, 24, steps=_RESIDUAL), (1, 8, 8)),
        (Conv(130, 130, pad=2, dilation=2), (1, 15, 26)),
        (Conv(17, 12, taps=2, pad=0), (1, 40, 41)),
    ]
    # Layers of ResNet50, and a first one, at batch 8.
    large = [
        (Conv(64, 64), (8, 56, 56)),
        (Conv(256, 64, taps=1, pad=0), (8, 56, 56)),
        (Conv(512, 512, steps=_RESIDUAL), (8, 7, 7)),
        (Conv(16, 64, taps=7, pad=3, stride=2), (8, 224, 224)),
    ]
    return found if small else found + large


class ConvProblem:
    """Random operands of a convolution, on the host and on the device."""

    def __init__(
        self, conv: Conv, kernels: tuple[Kernels, Kernels], shape: tuple[int, int, int],
        rng: np.random.Generator,
    ) -> None:  # fmt: skip
        self.conv, (self.image, self.product) = conv, kernels
        count, height, width = shape
        stored = (count, height + 2 * conv.pad, width + 2 * conv.pad)
        known = geometry(conv.region)
        down, across = (
            (size - span) // conv.stride + 1
            for size, span in zip(stored[1:], known.spans, strict=True)
        )
        self.stored = (*stored, padded_channels(conv.channels))
        self.made = (count, conv.columns, down, across)
        self.zero, self.scale = int(rng.integers(40, 200)), np.float32(0.03)
        taps = (conv.taps, conv.taps)
        self.w = rng.integers(-127, 128, (conv.columns, conv.channels, *taps)).astype(np.int8)
        self.ws = rng.uniform(1e-3, 1e-2, conv.columns).astype(np.float32)
        x = rng.standard_normal((count, conv.channels, height, width)) * 2 + 1
        self.host: dict[str, Array] = {"x": x.astype(np.float16)}
        for i, kind in enumerate(conv.region.extras):
            wanted = (conv.columns,) if kind == "channel" else self.made
            self.host[f"extra{i}"] = rng.standard_normal(wanted).astype(np.float16)
        self.given = self._uploaded()

    @property
    def rows(self) -> int:
        """Pixels of the result."""
        return self.made[0] * self.made[2] * self.made[3]

    def _uploaded(self) -> dict[str, int]:
        upload, region = self.product.device.upload, self.conv.region
        matrix = conv_matrix(self.w)
        scales = pack_scales(self.ws * self.scale, region, w=matrix, zero=self.zero)
        return {name: upload(array) for name, array in self.host.items()} | {
            "s": upload(np.full(1, self.scale)), "z": upload(np.full(1, self.zero, np.uint8)),
            "w": upload(pack(matrix, region)), "ws": upload(scales),
            # Some more of each, which must stay as they are.
            "q": upload(np.full(int(np.prod(self.stored)) + 64, 7, np.uint8)),
            "y": upload(np.full(int(np.prod(self.made)) + 64, np.nan, np.float16)),
        }  # fmt: skip

    def run(self) -> None:
        """Launch both kernels."""
        _, _, height, width = self.host["x"].shape
        pixels = self.stored[0] * self.stored[1] * self.stored[2]
        self.image.run(self.given, pixels, height=height, width=width)
        self.product.run(self.given, self.rows, height=self.stored[1], width=self.stored[2])

    def cost(self) -> tuple[int, int]:
        """Bytes that both kernels read and write at least, and operations of the product."""
        taps = self.conv.taps**2
        made, stored = int(np.prod(self.made)), int(np.prod(self.stored))
        moved = sum(array.nbytes for array in self.host.values()) + 2 * stored + 2 * made
        return moved + self.w.nbytes, 2 * made * taps * self.conv.channels

    def error(self, rng: np.random.Generator) -> float:
        """The largest, as a part of the largest result; infinite if anything else is wrong."""
        self.run()
        download = self.product.device.download
        q = download(self.given["q"], np.uint8, int(np.prod(self.stored)) + 64)
        y = download(self.given["y"], np.float16, int(np.prod(self.made)) + 64)
        if not np.isnan(y[-64:]).all() or (q[-64:] != 7).any():
            return float("inf")
        image = q[:-64].reshape(self.stored)
        if np.abs(image.astype(int) - self._image()).max() > 1:  # at ties
            return float("inf")
        results = y[:-64].reshape(self.made)
        places = [tuple(rng.integers(0, self.made)) for _ in range(_CHECKED)]
        expected = np.array([self._result(image, *place) for place in places])
        got = np.array([results[place] for place in places], np.float64)
        worst = np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-6)
        return float(worst) if np.isfinite(worst) else float("inf")

    def _image(self) -> Array:
        x = self.host["x"].astype(np.float64) / float(self.scale)
        stored = np.clip(np.rint(x) + self.zero, 0, 255).transpose(0, 2, 3, 1)
        pad, more = self.conv.pad, self.stored[3] - self.conv.channels
        widths = ((0, 0), (pad, pad), (pad, pad), (0, more))
        return np.pad(stored, widths, constant_values=self.zero).astype(int)

    def _result(self, image: Array, b: int, n: int, i: int, j: int) -> float:
        conv, step = self.conv, self.conv.dilation
        top, left, span = i * conv.stride, j * conv.stride, (conv.taps - 1) * step + 1
        patch = image[b, top : top + span : step, left : left + span : step, : conv.channels]
        centred = patch.astype(np.int64) - self.zero
        total = (centred * self.w[n].transpose(1, 2, 0)).sum()
        value = float(total) * float(self.ws[n]) * float(self.scale)
        if conv.steps:
            value += float(self.host["extra0"][n])
        if conv.steps == _RESIDUAL:
            value += float(self.host["extra1"][b, n, i, j])
        return max(value, 0.0) if conv.steps else value
