"""Images as samples: what is done to a picture before a model sees it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qcompiler.ir.errors import CalibrationError, OptionError, did_you_mean

__all__ = ["IMAGES", "Preprocess"]

IMAGES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
"""Suffixes of files that are images; of one that moves the first picture is taken."""


_CHOICES = {
    "order": ("rgb", "bgr", "gray"),
    "layout": ("nchw", "nhwc"),
    "dtype": ("float32", "float16", "uint8"),
}
_EIGHT_BITS = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK",
                         "YCbCr", "LAB", "HSV"})  # fmt: skip
_LARGEST = 1 << 14
"""Pixels of a side."""


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Resize, crop, scale, order: "size=224,resize=256,mean=0.5/0.5/0.5" as text.

    Attributes:
        size: Height and width that the model takes.
        resize: The shorter side before the middle is cropped; by default the picture is stretched.
        scale: What values of 0 to 255 are divided by.
        mean: Subtracted per channel, after the division.
        std: What channels are divided by then.
        order: Of the channels.
        layout: Of the array: [1, C, H, W] or [1, H, W, C].
        dtype: Of the array.  A model that takes uint8 does the arithmetic itself: it gets 0 to 255,
            as decoded.
    """

    size: tuple[int, int]
    resize: int | None = None
    scale: float = 255.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    order: Literal["rgb", "bgr", "gray"] = "rgb"
    layout: Literal["nchw", "nhwc"] = "nchw"
    dtype: Literal["float32", "float16", "uint8"] = "float32"

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            OptionError: One out of range, or not as many as there are channels.
        """
        for name in _CHOICES:
            if getattr(self, name) not in _CHOICES[name]:
                known = ", ".join(_CHOICES[name])
                raise OptionError(f"preprocess {name}={getattr(self, name)}: one of {known}")
        size = self.size
        if not isinstance(size, tuple) or [type(side) for side in size] != [int, int]:
            raise OptionError(f"preprocess size={size!r}: two whole numbers, height and width")
        for name in ("mean", "std"):
            if not isinstance(getattr(self, name), tuple):
                raise OptionError(f"preprocess {name}={getattr(self, name)!r}: a tuple of numbers")
        channels = 1 if self.order == "gray" else 3
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, channels):
                given = "/".join(f"{value:g}" for value in getattr(self, name))
                raise OptionError(f"preprocess {name}={given}: give 1 or {channels} values")
        if max(self.size) > _LARGEST or (self.resize or 0) > _LARGEST:
            raise OptionError(f"preprocess: sizes above {_LARGEST} are taken for mistakes")
        if min(self.size) < 1 or (self.resize is not None and self.resize < max(self.size)):
            raise OptionError(
                f"preprocess size={'x'.join(map(str, self.size))}, resize={self.resize}: sizes are "
                "from 1, and resize not below size"
            )
        if not self.scale or not all(self.std):
            raise OptionError("preprocess: scale and std divide, and must not be 0")
        plain = self.scale in (1.0, 255.0) and not any(self.mean) and set(self.std) == {1.0}
        if self.dtype == "uint8" and not plain:
            raise OptionError(
                "preprocess dtype=uint8: a model that takes bytes gets 0 to 255; leave out scale, "
                "mean and std"
            )

    @classmethod
    def parse(cls, text: str) -> Preprocess:
        """Read "size=224x320,mean=0.485/0.456/0.406,layout=nhwc".

        Raises:
            OptionError: An unknown key, a value of the wrong kind, or no size.
        """
        values: dict[str, Any] = {}
        for part in text.split(","):
            key, found, value = (item.strip() for item in part.partition("="))
            if key in values:
                raise OptionError(f"preprocess {part!r}: {key} is given twice")
            if key not in _PARSERS or not found:
                hint = did_you_mean(key, _PARSERS) or f"; the keys are {', '.join(_PARSERS)}"
                wrong = f"has no key {key!r}" if found else "is not KEY=VALUE"
                raise OptionError(f"preprocess {part!r} {wrong}{'' if key in _PARSERS else hint}")
            try:
                values[key] = _PARSERS[key](value)
            except ValueError as error:
                raise OptionError(f"preprocess {part!r}: {error}") from None
        if "size" not in values:
            raise OptionError(f"preprocess {text!r} does not say size=HEIGHTxWIDTH")
        return cls(**values)

    def read(self, path: Path) -> NDArray[Any]:
        """The picture as the model takes it, of one image: [1, C, H, W] or [1, H, W, C].

        Raises:
            ValueError: It does not decode.
            CalibrationError: Pillow is not installed.
        """
        try:
            import PIL.Image
            import PIL.ImageOps
        except ImportError as error:
            raise CalibrationError(
                "images are decoded by Pillow: pip install 'qcompiler[images]'"
            ) from error
        try:
            with PIL.Image.open(path) as image:
                upright = PIL.ImageOps.exif_transpose(image)
                if upright.mode not in _EIGHT_BITS:
                    upright = _eight_bits(upright)
                picture = upright.convert("L" if self.order == "gray" else "RGB")
        except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            raise ValueError(f"an image that does not decode: {error}") from error
        height, width = self.size
        if self.resize is not None:
            factor = self.resize / min(picture.size)
            sides = [max(self.resize, math.floor(side * factor + 0.5)) for side in picture.size]
            picture = picture.resize((sides[0], sides[1]), PIL.Image.Resampling.BILINEAR)
            left, top = (sides[0] - width) // 2, (sides[1] - height) // 2
            picture = picture.crop((left, top, left + width, top + height))
        else:
            picture = picture.resize((width, height), PIL.Image.Resampling.BILINEAR)
        pixels = np.asarray(picture, np.float32).reshape(height, width, -1)
        if self.order == "bgr":
            pixels = pixels[..., ::-1]
        array = self._scaled(pixels)[None]
        return np.ascontiguousarray(array.transpose(0, 3, 1, 2) if self.layout == "nchw" else array)

    def _scaled(self, pixels: NDArray[np.float32]) -> NDArray[Any]:
        """The values that the model takes of pixels from 0 to 255; channels last."""
        if self.dtype == "uint8":
            return pixels.astype(np.uint8)
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return ((pixels / np.float32(self.scale) - mean) / std).astype(self.dtype)


def _eight_bits(image: Any) -> Any:
    """A gray picture of 16 bits as one of 8: Pillow would clip it.

    Raises:
        ValueError: Its pixels are of some other kind.
    """
    import PIL.Image

    if not image.mode.startswith("I"):
        raise ValueError(f"an image of mode {image.mode}, which has no scale: save it with 8 bits")
    pixels = np.asarray(image).astype(np.float64) / 257
    return PIL.Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def _size(text: str) -> tuple[int, int]:
    sides = [int(side) for side in text.lower().split("x")]
    if len(sides) > 2:
        raise ValueError("sizes are HEIGHTxWIDTH, or one number for both")
    return sides[0], sides[-1]


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(value) for value in text.split("/"))


def _one_of(*choices: str) -> Any:
    def parse(text: str) -> str:
        if text.lower() not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return text.lower()

    return parse


_PARSERS = {
    "size": _size,
    "resize": int,
    "scale": float,
    "mean": _floats,
    "std": _floats,
    "order": _one_of(*_CHOICES["order"]),
    "layout": _one_of(*_CHOICES["layout"]),
    "dtype": _one_of(*_CHOICES["dtype"]),
}
