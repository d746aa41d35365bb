"""Random convolutions for the kernels, and how far their results are off; part of `cuda.py`."""

from __future__ import annotations

import dataclasses

import numpy as np
from cuda_device import Array, Kernels

from qcompiler.ir.dialect_image import padded_channels
from qcompiler.ir.region import HALF, Region, Step
from qcompiler.targets.cuda.image_plan import geometry
from qcompiler.targets.cuda.packing import conv_matrix, pack, pack_scales

__all__ = ["TOLERANCE", "Conv", "ConvProblem", "convs_to_check"]

TOLERANCE = 4e-3
"""Of the largest result: float16 rounds results, and weights times their scales, by 2^-11."""

_BIAS_RELU = (Step("Add", (0, -1)), Step("Relu", (1,)))
_RESIDUAL = (Step("Add", (0, -1)), Step("Add", (1, -2)), Step("Relu", (2,)))
_CHECKED = 64
"""Results that are compared."""


def _pads(channels: int, pad: int) -> tuple[int, ...]:
    return (0, pad, pad, 0, 0, pad, pad, padded_channels(channels) - channels)


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
    group: int = 1
    made: int | None = None
    """The border of a result that is stored as an image; None for one in planes."""

    @property
    def region(self) -> Region:
        """That of the product."""
        sizes = (("K", self.channels), ("N", self.columns), ("R", self.taps), ("S", self.taps))
        count = 2 if self.steps == _RESIDUAL else len(self.steps[:1])
        attributes = {
            "dilations": (self.dilation,) * 2, "group": self.group, "strides": (self.stride,) * 2
        }  # fmt: skip
        if self.made is not None:
            attributes["pads"] = _pads(self.columns, self.made)
        return Region(
            "QConvW8A8" if self.made is None else "QConvImageW8A8", sizes,
            ("channel", "tensor")[:count], self.steps, flags=(HALF,),
            outputs=() if self.made is None else ("made",),
            attributes=tuple(sorted(attributes.items())),
        )  # fmt: skip

    @property
    def image(self) -> Region:
        """That of its activations."""
        pads = _pads(self.channels, self.pad)
        return Region(
            "QuantizeImage", (("K", self.channels),), attributes=(("pads", pads),), flags=(HALF,)
        )

    def stored_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int, int]:
        """That of the stored image, of so many images of so many pixels."""
        count, height, width = shape
        more = 2 * self.pad
        return count, height + more, width + more, padded_channels(self.channels)

    def made_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int, int]:
        """That of the result, in planes."""
        count, *sizes, _ = self.stored_shape(shape)
        down, across = (
            (size - span) // self.stride + 1
            for size, span in zip(sizes, geometry(self.region).spans, strict=True)
        )
        return count, self.columns, down, across

    def image_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int, int]:
        """That of the result, as an image."""
        count, columns, down, across = self.made_shape(shape)
        more = 2 * (self.made or 0)
        return count, down + more, across + more, padded_channels(columns)


def convs_to_check(small: bool) -> list[tuple[Conv, tuple[int, int, int]]]:
    """With the images: odd sizes, borders, strides, dilations, K in splits, many pixels."""
    found = [
        (Conv(20, 40), (2, 9, 7)),
        (Conv(64, 136, taps=1, pad=0, stride=2, steps=()), (3, 9, 9)),
        (Conv(160, 24, steps=_RESIDUAL), (1, 8, 8)),
        (Conv(130, 130, pad=2, dilation=2), (1, 15, 26)),
        (Conv(17, 12, taps=2, pad=0), (1, 66, 67)),
        # Stored as images, whole and in splits; groups; depthwise ones.
        (Conv(20, 40, made=1), (2, 9, 7)),
        (Conv(160, 40, steps=_RESIDUAL, made=1), (1, 8, 8)),
        (Conv(72, 144, group=3, made=2), (1, 9, 9)),
        (Conv(24, 24, group=24, steps=()), (2, 9, 7)),
        (Conv(140, 140, taps=5, pad=2, stride=2, group=140, made=1), (1, 18, 19)),
    ]
    # Layers of ResNet50, and a first one, at batch 8.
    large = [
        (Conv(64, 64), (8, 56, 56)),
        (Conv(256, 64, taps=1, pad=0), (8, 56, 56)),
        (Conv(512, 512, steps=_RESIDUAL), (8, 7, 7)),
        (Conv(16, 64, taps=7, pad=3, stride=2), (8, 224, 224)),
        (Conv(64, 64, made=1), (8, 56, 56)),
        (Conv(256, 64, taps=1, pad=0, made=1), (8, 56, 56)),
        # Of ResNeXt50 and of MobileNetV2.
        (Conv(128, 128, group=32, made=0), (8, 56, 56)),
        (Conv(144, 144, group=144, made=0), (8, 56, 56)),
        (Conv(576, 576, group=576, made=0), (8, 14, 14)),
    ]
    return found if small else found + large


class ConvProblem:
    """Random operands of a convolution, on the host and on the device."""

    def __init__(
        self, conv: Conv, kernels: tuple[Kernels, Kernels], shape: tuple[int, int, int],
        rng: np.random.Generator,
    ) -> None:  # fmt: skip
        self.conv, (self.image, self.product) = conv, kernels
        self.stored, self.made = conv.stored_shape(shape), conv.made_shape(shape)
        count, height, width = shape
        self.zero, self.scale = int(rng.integers(40, 200)), np.float32(0.03)
        taps = (conv.taps, conv.taps)
        given = conv.channels // conv.group
        self.w = rng.integers(-127, 128, (conv.columns, given, *taps)).astype(np.int8)
        self.step, self.middle = np.float32(0.03 * (given * conv.taps**2) ** 0.5), 100
        if conv.made is not None:
            self.stored_result = conv.image_shape(shape)
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
        matrix = conv_matrix(self.w, region)
        made = None if self.conv.made is None else (float(self.step), self.middle)
        scales = pack_scales(self.ws * self.scale, region, w=matrix, zero=self.zero, result=made)
        size = 16 if made is None else int(np.prod(self.stored_result))
        return {name: upload(array) for name, array in self.host.items()} | {
            "s": upload(np.full(1, self.scale)), "z": upload(np.full(1, self.zero, np.uint8)),
            "w": upload(pack(matrix, region)), "ws": upload(scales),
            # Some more of each, which must stay as they are.
            "q": upload(np.full(int(np.prod(self.stored)) + 64, 7, np.uint8)),
            "y": upload(np.full(int(np.prod(self.made)) + 64, np.nan, np.float16)),
            "made": upload(np.full(size + 64, 7, np.uint8)),
        }  # fmt: skip

    def run(self) -> None:
        """Launch both kernels."""
        _, _, height, width = self.host["x"].shape
        pixels = self.stored[0] * self.stored[1] * self.stored[2]
        self.image.run(self.given, pixels, height=height, width=width)
        self.product.run(self.given, self.rows, height=self.stored[1], width=self.stored[2])

    def cost(self) -> tuple[int, int]:
        """Bytes that both kernels read and write at least, and operations of the product."""
        made, stored = int(np.prod(self.made)), int(np.prod(self.stored))
        moved = sum(array.nbytes for array in self.host.values()) + 2 * stored
        moved += 2 * made if self.conv.made is None else int(np.prod(self.stored_result))
        return moved + self.w.nbytes, 2 * made * int(np.prod(self.w.shape[1:]))

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
        if self.conv.made is not None:
            return self._error_of_image(image, rng)
        places = [tuple(rng.integers(0, self.made)) for _ in range(_CHECKED)]
        expected = np.array([self._result(image, *place) for place in places])
        got = np.array([results[place] for place in places], np.float64)
        worst = np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-6)
        return float(worst) if np.isfinite(worst) else float("inf")

    def _error_of_image(self, image: Array, rng: np.random.Generator) -> float:
        """Bytes may be one off; the border and padding may not."""
        conv, pad = self.conv, self.conv.made
        assert pad is not None
        size = int(np.prod(self.stored_result))
        raw = self.product.device.download(self.given["made"], np.uint8, size + 64)
        found, (_, height, width, _) = raw[:-64].reshape(self.stored_result), self.stored_result
        inside = np.zeros(found.shape, bool)
        inside[:, pad : height - pad, pad : width - pad, : conv.columns] = True
        if (raw[-64:] != 7).any() or (found[~inside] != self.middle).any():
            return float("inf")
        worst = 0.0
        for _ in range(_CHECKED):
            b, n, i, j = (int(rng.integers(0, end)) for end in self.made)
            value = self._result(image, b, n, i, j) / float(self.step) + self.middle
            worst = max(worst, abs(found[b, i + pad, j + pad, n] - min(max(value, 0), 255)))
        # A step, with what float16 rounds, as a part of what is allowed of a product.
        return worst / 0.7 * TOLERANCE

    def _image(self) -> Array:
        x = self.host["x"].astype(np.float64) / float(self.scale)
        stored = np.clip(np.rint(x) + self.zero, 0, 255).transpose(0, 2, 3, 1)
        pad, more = self.conv.pad, self.stored[3] - self.conv.channels
        widths = ((0, 0), (pad, pad), (pad, pad), (0, more))
        return np.pad(stored, widths, constant_values=self.zero).astype(int)

    def _result(self, image: Array, b: int, n: int, i: int, j: int) -> float:
        conv, step = self.conv, self.conv.dilation
        top, left, span = i * conv.stride, j * conv.stride, (conv.taps - 1) * step + 1
        given = conv.channels // conv.group
        first = n // (conv.columns // conv.group) * given
        patch = image[b, top : top + span : step, left : left + span : step]
        patch = patch[..., first : first + given]
        centred = patch.astype(np.int64) - self.zero
        total = (centred * self.w[n].transpose(1, 2, 0)).sum()
        value = float(total) * float(self.ws[n]) * float(self.scale)
        if conv.steps:
            value += float(self.host["extra0"][n])
        if conv.steps == _RESIDUAL:
            value += float(self.host["extra1"][b, n, i, j])
        return max(value, 0.0) if conv.steps else value
