"""Draw handwritten-like digits: strokes in code, bent and dirtied at random.

A glyph is a table of control points and the strokes that run through them. An image is made in
four steps, all of them vectorised over the images of one glyph:

1. the control points are jittered, warped and sent through a random affine map;
2. Catmull-Rom splines through them become short segments;
3. a pixel's ink is one minus its distance to the nearest segment, past the pen's radius;
4. faint stray strokes, a scratch, a background slope, blur and noise are added.

Every image is ours: no data set is read. Only numpy is needed.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["GLYPHS", "SEEDS", "SIDE", "Glyph", "draw_digits", "write_samples"]

Array = NDArray[np.float32]

SIDE = 20
"""Height and width of an image, in pixels."""

SEEDS = {"train": 1, "validation": 2, "calib": 3, "test": 4}
"""One seed per split. `default_rng` hashes its seed, so the splits' streams are unrelated."""

_LEVELS = 255  # 8-bit grey, as a camera gives; unrounded noise would not deflate
_SPAN_SEGMENTS = 4  # segments per spline span; a span is 2 to 5 pixels, so chords look round
_CHUNK = 64  # images drawn at once: [64, 400, ~30] float32 temporaries are 3 MB, about a cache
_CLUTTER = 4  # stray strokes per image, most of them too faint or too far out to see


@dataclass(frozen=True)
class Glyph:
    """One way to write one digit.

    Attributes:
        digit: The label, 0 to 9.
        points: Control points (x, y), y downwards, in a box of about [-0.6, 0.6] x [-1, 1].
        strokes: Indices into `points`, one tuple per stroke. An index given twice in a row makes
            a sharp corner there; strokes that share an index stay joined under jitter.
    """

    digit: int
    points: tuple[tuple[float, float], ...]
    strokes: tuple[tuple[int, ...], ...]

    def segments(self) -> tuple[Array, Array]:
        """Return matrices [segments, points] that map control points to segment ends."""
        eye = np.eye(len(self.points))
        starts, ends = [], []
        for stroke in self.strokes:
            curve = _catmull_rom(eye[list(stroke)])
            starts.append(curve[:-1])
            ends.append(curve[1:])
        return np.concatenate(starts, dtype=np.float32), np.concatenate(ends, dtype=np.float32)


# One coordinate a line, as the formatter has it, would hide the shapes.
# fmt: off
GLYPHS = (
    Glyph(0,
        ((0.0, -1.0), (-0.5, -0.55), (-0.58, 0.1), (-0.4, 0.75), (0.0, 1.0), (0.42, 0.72),
         (0.58, 0.05), (0.45, -0.65)),
        ((0, 1, 2, 3, 4, 5, 6, 7, 0),)),
    Glyph(1,
        ((0.05, -1.0), (0.0, 0.0), (-0.05, 1.0)),
        ((0, 1, 2),)),
    Glyph(1,
        ((-0.35, -0.55), (0.1, -1.0), (0.08, 0.0), (0.05, 1.0)),
        ((0, 1, 1, 2, 3),)),
    Glyph(2,
        ((-0.5, -0.6), (-0.1, -1.0), (0.45, -0.65), (0.3, -0.05), (-0.15, 0.5), (-0.55, 0.95),
         (0.0, 0.92), (0.58, 0.95)),
        ((0, 1, 2, 3, 4, 5, 5, 6, 7),)),
    Glyph(2,
        ((-0.45, -0.65), (0.0, -1.0), (0.45, -0.6), (0.2, 0.1), (-0.35, 0.85), (-0.5, 0.55),
         (-0.1, 0.65), (0.6, 0.9)),
        ((0, 1, 2, 3, 4, 5, 6, 7),)),
    Glyph(3,
        ((-0.5, -0.8), (0.05, -1.0), (0.45, -0.6), (0.25, -0.15), (-0.15, 0.0), (0.35, 0.15),
         (0.52, 0.55), (0.05, 1.0), (-0.55, 0.75)),
        ((0, 1, 2, 3, 4, 4, 5, 6, 7, 8),)),
    Glyph(3,
        ((-0.5, -0.95), (0.45, -0.95), (-0.05, -0.2), (0.45, 0.1), (0.45, 0.7), (-0.05, 1.0),
         (-0.55, 0.75)),
        ((0, 1, 1, 2, 2, 3, 4, 5, 6),)),
    Glyph(4,
        ((0.2, -1.0), (-0.2, -0.35), (-0.6, 0.3), (0.0, 0.3), (0.6, 0.28), (0.25, -0.3),
         (0.22, 0.3), (0.2, 1.0)),
        ((0, 1, 2, 2, 3, 4), (0, 5, 6, 7))),
    Glyph(4,
        ((-0.4, -0.95), (-0.45, -0.4), (-0.5, 0.1), (0.0, 0.12), (0.45, 0.08), (0.45, -0.9),
         (0.4, 1.0)),
        ((0, 1, 2, 2, 3, 4), (5, 4, 6))),
    Glyph(5,
        ((0.5, -0.95), (0.0, -0.95), (-0.4, -0.92), (-0.45, -0.2), (0.1, -0.3), (0.52, 0.2),
         (0.35, 0.8), (-0.1, 1.0), (-0.55, 0.75)),
        ((0, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8),)),
    Glyph(6,
        ((0.35, -1.0), (-0.2, -0.5), (-0.52, 0.2), (-0.3, 0.85), (0.1, 1.0), (0.5, 0.6),
         (0.3, 0.12), (-0.1, 0.1), (-0.45, 0.45)),
        ((0, 1, 2, 3, 4, 5, 6, 7, 8),)),
    Glyph(7,
        ((-0.55, -0.9), (0.0, -0.92), (0.52, -0.92), (0.15, -0.1), (-0.15, 1.0)),
        ((0, 1, 2, 2, 3, 4),)),
    Glyph(7,
        ((-0.5, -0.9), (0.0, -0.92), (0.52, -0.92), (0.15, -0.05), (-0.15, 1.0), (-0.25, 0.0),
         (0.5, -0.08)),
        ((0, 1, 2, 2, 3, 4), (5, 3, 6))),
    Glyph(8,
        ((0.0, -0.05), (-0.42, -0.45), (0.0, -1.0), (0.42, -0.55), (-0.48, 0.5), (0.0, 1.0),
         (0.5, 0.5)),
        ((0, 1, 2, 3, 0, 4, 5, 6, 0),)),
    Glyph(9,
        ((0.45, -0.5), (0.05, -1.0), (-0.45, -0.6), (-0.3, -0.15), (0.1, -0.1), (0.42, -0.45),
         (0.42, 0.2), (0.35, 1.0)),
        ((0, 1, 2, 3, 4, 5, 0), (0, 6, 7))),
    Glyph(9,
        ((0.45, -0.55), (0.0, -1.0), (-0.45, -0.55), (-0.2, -0.1), (0.3, -0.2), (0.48, 0.2),
         (0.15, 0.9), (-0.45, 0.85)),
        ((0, 1, 2, 3, 4, 0), (0, 5, 6, 7))),
)
"""The sixteen ways to write the ten digits."""
# fmt: on


def draw_digits(count: int, seed: int, part: int = 0) -> tuple[Array, NDArray[np.int64]]:
    """Draw `count` images, the ten labels equally often (up to a remainder) in random order.

    Args:
        count: Number of images, N.
        seed: See `SEEDS`. The same arguments give the same images; other machines may round a few
            pixels to the next grey step.
        part: Which part of the split, when it is drawn in parts.

    Returns:
        Images float32 [N, 1, 20, 20] in [0, 1], ink bright, and labels int64 [N].
    """
    rng = np.random.default_rng([seed, part])
    labels = rng.permutation(np.arange(count, dtype=np.int64) % 10)
    styles = _pick_styles(rng, labels)
    images = np.empty((count, SIDE * SIDE), np.float32)
    for style, glyph in enumerate(GLYPHS):
        members = np.flatnonzero(styles == style)
        start, end = glyph.segments()
        for at in range(0, len(members), _CHUNK):
            chosen = members[at : at + _CHUNK]
            points = _bend(rng, glyph, len(chosen))
            images[chosen] = _paint(rng, start @ points, end @ points)
    images = _dirty(rng, images.reshape(count, SIDE, SIDE))
    return np.round(images * _LEVELS)[:, None] / np.float32(_LEVELS), labels


def write_samples(out: Path) -> None:
    """Write `calib/` (4 batches of 16 images) and `test/` (10 batches of 100, with labels)."""
    for split, batches, size in (("calib", 4, 16), ("test", 10, 100)):
        (out / split).mkdir(parents=True, exist_ok=True)
        images, labels = draw_digits(batches * size, SEEDS[split])
        for batch in range(batches):
            rows = slice(batch * size, (batch + 1) * size)
            file = out / split / f"batch_{batch:02d}.npz"
            if split == "calib":
                np.savez_compressed(file, image=images[rows])
            else:
                np.savez_compressed(file, image=images[rows], label=labels[rows])


def _catmull_rom(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sample the Catmull-Rom spline (1974) through the rows of `points`, ends doubled."""
    padded = np.concatenate([points[:1], points, points[-1:]])
    t = np.arange(_SPAN_SEGMENTS)[:, None] / _SPAN_SEGMENTS
    spans = []
    for p0, p1, p2, p3 in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        if np.array_equal(p1, p2):  # a doubled index: the corner itself, not a tiny loop
            continue
        bend = 2 * p0 - 5 * p1 + 4 * p2 - p3
        spans.append(p1 + 0.5 * t * (p2 - p0 + t * (bend + t * (3 * (p1 - p2) + p3 - p0))))
    return np.concatenate([*spans, points[-1:]])


def _pick_styles(rng: np.random.Generator, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pick for each label one of its glyphs, all equally likely; return indices of `GLYPHS`."""
    digits = np.array([glyph.digit for glyph in GLYPHS])
    first = np.searchsorted(digits, np.arange(10))
    ways = np.bincount(digits)
    return first[labels] + rng.integers(0, ways[labels])


def _bend(rng: np.random.Generator, glyph: Glyph, count: int) -> Array:
    """Return `count` random versions of the glyph's points, [count, points, 2], in pixels."""
    points = np.array(glyph.points) + rng.normal(0, 0.075, (count, len(glyph.points), 2))
    # A quadratic warp bends whole strokes, which jitter of single points cannot.
    warp = rng.normal(0, 0.1, (count, 1, 2))
    points = points + warp * (points[..., ::-1] ** 2 - 0.4)
    angle = rng.normal(0, 0.2, count)
    shear = rng.normal(0.0, 0.2, count)
    scale = rng.uniform(5.0, 8.0, (count, 1, 1)) * rng.uniform(0.85, 1.15, (count, 1, 2))
    turn = np.stack([np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle)], axis=-1)
    points[..., 0] -= shear[:, None] * points[..., 1]
    points = (points * scale) @ turn.reshape(count, 2, 2)
    # Keep control points inside, but shift by half a pixel even a digit that fills the image.
    room = np.maximum(SIDE / 2 - 0.5 - np.abs(points).max(axis=1, keepdims=True), 0.5)
    shift = rng.uniform(-1, 1, (count, 1, 2)) * np.minimum(room, 3.0)
    moved: Array = (points + shift + (SIDE - 1) / 2).astype(np.float32)
    return moved


def _paint(rng: np.random.Generator, start: Array, end: Array) -> Array:
    """Paint segments [count, segments, 2] and their clutter; return [count, pixels]."""
    count = len(start)
    radius = rng.uniform(0.35, 1.35, (count, 1)).astype(np.float32)
    ink = rng.uniform(0.45, 1.0, (count, 1)).astype(np.float32)
    image = ink * _coverage(start, end, radius)
    for _ in range(_CLUTTER):
        stray, faint = _stray(rng, count), rng.uniform(-0.5, 0.75, (count, 1))
        shade = ink * np.maximum(faint, 0).astype(np.float32)
        image = np.maximum(image, shade * _coverage(*stray, 0.7 * radius))
    # A scratch takes ink away: the one damage that a thicker pen does not hide.
    depth = np.maximum(rng.uniform(-0.8, 0.9, (count, 1)), 0).astype(np.float32)
    image *= 1 - depth * _coverage(*_stray(rng, count), np.float32(0.5))
    return image


def _stray(rng: np.random.Generator, count: int) -> tuple[Array, Array]:
    """Return one random segment per image, 2 to 8 pixels long, as ends [count, 1, 2]."""
    middle = rng.uniform(-1, SIDE, (count, 1, 2))
    angle, half = rng.uniform(0, np.pi, (count, 1)), rng.uniform(1, 4, (count, 1, 1))
    along = half * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    return (middle - along).astype(np.float32), (middle + along).astype(np.float32)


def _coverage(start: Array, end: Array, radius: Array | np.float32) -> Array:
    """Return ink in [0, 1], [count, pixels], of round-ended strokes; edges one pixel soft."""
    pixel = np.stack(np.meshgrid(*[np.arange(SIDE, dtype=np.float32)] * 2), axis=-1)
    pixel = pixel.reshape(-1, 2)
    along = end - start
    length2 = np.maximum((along**2).sum(-1), np.float32(1e-6))[:, None]
    # |p - (a + t d)|^2 written out, so that the [pixels, segments] products are matrix products.
    dot = pixel @ along.swapaxes(1, 2) - (start * along).sum(-1)[:, None]
    far2 = (pixel**2).sum(-1)[:, None] - 2 * (pixel @ start.swapaxes(1, 2))
    far2 += (start**2).sum(-1)[:, None]
    t = np.clip(dot / length2, 0, 1)
    near2 = (far2 - t * (2 * dot - t * length2)).min(axis=-1)
    ink: Array = np.clip(radius + np.float32(0.5) - np.sqrt(np.maximum(near2, 0)), 0, 1)
    return ink


def _dirty(rng: np.random.Generator, images: Array) -> Array:
    """Blur, add a background slope and noise; images [count, 20, 20] stay in [0, 1]."""
    count = len(images)
    side = rng.uniform(0, 0.27, (count, 1, 1)).astype(np.float32)  # 3-tap kernel (s, 1 - 2s, s)
    for axis in (1, 2):
        pad = [(0, 0), (int(axis == 1),) * 2, (int(axis == 2),) * 2]
        wide = np.moveaxis(np.pad(images, pad, mode="edge"), axis, 0)
        near = np.moveaxis(wide[:-2] + wide[2:], 0, axis)
        images = (1 - 2 * side) * images + side * near
    slope = rng.uniform(-0.15, 0.15, (count, 2, 1)).astype(np.float32)
    ramp = np.linspace(-1, 1, SIDE, dtype=np.float32)
    ground = (slope[:, 0] * ramp)[:, :, None] + (slope[:, 1] * ramp)[:, None, :]
    ground += rng.uniform(-0.1, 0.15, (count, 1, 1)).astype(np.float32)
    noise = rng.standard_normal(images.shape, dtype=np.float32)
    noise *= rng.uniform(0.02, 0.13, (count, 1, 1)).astype(np.float32)
    return np.clip(images + ground * (1 - images) + noise, 0, 1)


def main() -> None:
    """Write the calibration and test samples."""
    parser = argparse.ArgumentParser(description="Draw the calibration and test samples.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    write_samples(parser.parse_args().out)


if __name__ == "__main__":
    main()
