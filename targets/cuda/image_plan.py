"""How the kernels of convolutions are launched.  Nothing here imports tvm.

Rows are pixels of what a kernel makes.  `QuantizeImage` has blocks of 128 pixels and 64 channels.
"""

from __future__ import annotations

import dataclasses

from qcompiler.ir.region import Region
from qcompiler.targets.cuda.launch import Launch

__all__ = [
    "BLOCK_CHANNELS",
    "BLOCK_PIXELS",
    "IMAGE_PITCH",
    "Geometry",
    "border",
    "geometry",
    "image_launches",
    "unsupported_conv",
    "unsupported_image",
]

BLOCK_PIXELS, BLOCK_CHANNELS = 128, 64
IMAGE_PITCH = BLOCK_CHANNELS // 4 + 1
"""Words from one pixel to the next in shared memory: one more, for other banks."""
MAX_KERNEL = 1 << 16
"""Taps of a convolution, and steps of a stride or dilation."""


def border(region: Region) -> tuple[int, int, int, int]:
    """Pixels around an image: above, to the left, below, to the right."""
    _, top, left, _, _, bottom, right, _ = region.integers("pads")
    return top, left, bottom, right


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Of a convolution, each downwards and across.

    Attributes:
        kernel: Taps.
        strides: Pixels of the stored image from one result to the next.
        dilations: Those from one tap to the next.
    """

    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]

    @property
    def spans(self) -> tuple[int, int]:
        """Pixels from the first tap to the last."""
        down, across = (
            (taps - 1) * step + 1 for taps, step in zip(self.kernel, self.dilations, strict=True)
        )
        return down, across


def geometry(region: Region) -> Geometry:
    """That of a convolution."""
    strides, dilations = (region.integers(name) for name in ("strides", "dilations"))
    return Geometry(
        (region.size("R"), region.size("S")),
        (strides[0], strides[1]),
        (dilations[0], dilations[1]),
    )


def unsupported_image(region: Region) -> str | None:
    """Why an image has no kernel that quantizes it, or None when it has one."""
    if region.steps or region.extras:
        return f"{region.anchor} takes no epilogue"
    return _unsupported_border(region)


def _unsupported_border(region: Region) -> str | None:
    if any(not 0 <= width < MAX_KERNEL for width in border(region)):
        return f"a border of {border(region)} pixels is none, or too wide"
    return None


def unsupported_conv(region: Region) -> str | None:
    """Why a convolution has no geometry that kernels know, or None when it has."""
    known = geometry(region)
    if any(not 0 < size < MAX_KERNEL for size in (*known.kernel, *known.strides, *known.dilations)):
        return f"strides {known.strides} or dilations {known.dilations} are none, or too long"
    group, channels, columns = int(region.number("group")), region.size("K"), region.size("N")
    if group < 1 or channels % group or columns % group:
        return f"{group} groups do not divide {channels} channels and {columns} of the result"
    if "made" in region.outputs and (reason := _unsupported_border(region)) is not None:
        return reason
    return "no kernel divides channels of images" if region.widths else None


def image_launches(region: Region) -> tuple[Launch, ...]:
    """One kernel for any number of pixels."""
    return (
        Launch(
            symbol=f"{region.name}_image_kernel",
            max_rows=None,
            threads=BLOCK_PIXELS,
            shared_bytes=BLOCK_PIXELS * IMAGE_PITCH * 4,
            block_rows=BLOCK_PIXELS,
            block_columns=BLOCK_CHANNELS,
            parameters=("q", "s", "x", "z", "height", "rows", "width"),
        ),
    )
