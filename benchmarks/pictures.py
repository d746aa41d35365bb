"""Pictures to run networks on: photos, and pages and lines of text that are drawn here.

Photos come from a folder; without one they are crops of the few that scikit-image, scikit-learn and
matplotlib carry, which says less.  Fonts are matplotlib's DejaVu, words the documentation inside
Python itself.
"""

from __future__ import annotations

import pydoc_data.topics
import re
from pathlib import Path

import numpy as np
from packages import package
from PIL import Image, ImageDraw, ImageFilter, ImageFont

CARRIERS = ("scikit-image==0.26.0", "scikit-learn==1.9.1", "matplotlib==3.11.2")
"""Packages with photos in them."""

FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf")
SUFFIXES = {".jpg", ".jpeg", ".png"}


def photos(folder: Path | None, count: int) -> list[Image.Image]:
    """Pictures in colour, every second one of a folder by name, or crops without a folder."""
    if folder is not None:
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
        return [Image.open(file).convert("RGB") for file in files[::2][:count]]
    rng = np.random.default_rng(0)
    sources = _carried()
    return [_crop(sources[index % len(sources)], rng) for index in range(count)]


def _carried() -> list[Image.Image]:
    found = []
    for requirement in CARRIERS:
        for file in sorted(package(requirement).rglob("*")):
            if file.suffix.lower() not in SUFFIXES:
                continue
            picture = Image.open(file)
            # Icons and plots are no photos: those are large and of many colours.
            if min(picture.size) >= 250 and picture.mode in ("RGB", "RGBA"):
                small = np.asarray(picture.convert("RGB").resize((64, 64))).reshape(-1, 3)
                if len(np.unique(small // 8, axis=0)) > 600:
                    found.append(picture.convert("RGB"))
    assert found, "the packages have no photos"
    return found


def _crop(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A part of a third to all of it, some mirrored, some darker."""
    width, height = picture.size
    side = int(min(width, height) * rng.uniform(0.33, 1))
    left, top = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
    part = picture.crop((left, top, left + side, top + side)).resize((256, 256), Image.BILINEAR)
    if rng.random() < 0.5:
        part = part.transpose(Image.FLIP_LEFT_RIGHT)
    gain = rng.uniform(0.6, 1.2)
    return part.point(lambda value: min(255, int(value * gain)))


def center(picture: Image.Image, resize: int, size: int) -> np.ndarray:
    """The middle of a picture whose shorter side is `resize`: [size, size, 3], RGB of 0 to 255."""
    scale = resize / min(picture.size)
    shape = tuple(max(size, round(side * scale)) for side in picture.size)
    small = picture.resize(shape, Image.BILINEAR)
    left, top = (shape[0] - size) // 2, (shape[1] - size) // 2
    return np.asarray(small.crop((left, top, left + size, top + size)), np.float32)


def phrases(count: int, seed: int, words: tuple[int, int]) -> list[str]:
    """So many words of prose each."""
    rng = np.random.default_rng(seed)
    known = re.findall(r"[A-Za-z]{2,10}|[0-9]{1,4}", "\n".join(pydoc_data.topics.topics.values()))
    return [" ".join(rng.choice(known, rng.integers(words[0], words[1] + 1))) for _ in range(count)]


def line(text: str, rng: np.random.Generator, height: int = 48, width: int = 320) -> np.ndarray:
    """A line of text as recognition sees it: [3, height, width], BGR of -1 to 1, 0 to the right."""
    font = _font(rng, int(rng.integers(24, 34)))
    left, top, right, bottom = font.getbbox(text)
    paper, ink = int(rng.integers(170, 256)), int(rng.integers(0, 90))
    picture = Image.new("RGB", (right - left + 16, bottom - top + 12), (paper,) * 3)
    ImageDraw.Draw(picture).text((8 - left, 6 - top), text, fill=(ink,) * 3, font=font)
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.6)))
    wide = min(width, round(picture.width * height / picture.height))
    pixels = np.asarray(picture.resize((wide, height), Image.BILINEAR), np.float32)
    pixels = np.clip(pixels + rng.normal(0, rng.uniform(0, 8), pixels.shape), 0, 255)
    result = np.zeros((3, height, width), np.float32)
    result[:, :, :wide] = (pixels[:, :, ::-1] / 127.5 - 1).transpose(2, 0, 1)
    return result


def page(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A page with a title, paragraphs, a table and a figure, in turn and of random sizes."""
    sheet = Image.new("RGB", (width, height), (int(rng.integers(215, 256)),) * 3)
    draw, top = ImageDraw.Draw(sheet), int(rng.integers(15, 40))
    for kind in rng.permutation(["title", "text", "text", "table", "figure", "text"]):
        left = int(rng.integers(15, 60))
        if kind == "figure":
            box = (left, top, left + int(rng.integers(150, 300)), top + int(rng.integers(80, 150)))
            noise = rng.integers(40, 220, (8, 8, 3)).astype(np.uint8)
            drawn = Image.fromarray(noise).resize((box[2] - box[0], box[3] - box[1]))
            sheet.paste(drawn, box[:2])
            top = box[3] + 20
            continue
        size = int(rng.integers(22, 30)) if kind == "title" else int(rng.integers(11, 16))
        font = _font(rng, size)
        rows = 1 if kind == "title" else int(rng.integers(3, 8))
        for text in phrases(rows, int(rng.integers(1 << 30)), (3, 7)):
            draw.text((left, top), text, fill=(int(rng.integers(0, 80)),) * 3, font=font)
            if kind == "table":
                draw.line((left, top, width - left, top), fill=(90, 90, 90))
            top += size + 6
        top += 14
    return sheet


def _font(rng: np.random.Generator, size: int) -> ImageFont.FreeTypeFont:
    (folder,) = package(CARRIERS[2]).rglob("fonts/ttf")
    return ImageFont.truetype(folder / str(rng.choice(FONTS)), size)
