"""Synthetic scenes: a few coloured handwritten digits on a textured background with clutter.

A scene is 96 x 96 pixels, as many as the 32 location bins of an answer cover, cut by the vision
tower into 12 x 12 patches of 8 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from . import digits
from .boxes import BIN, Box
from .digits import Split
from .vocabulary import COLOURS, DIGITS, LOCATIONS, TEXTURES

Floats = npt.NDArray[np.float32]

SIDE: Final = LOCATIONS * BIN
PATCH: Final = 8
GRID: Final = SIDE // PATCH
PATCHES: Final = GRID * GRID
VISIBLE: Final = 0.2  # share of a patch that a digit's box must cover for the patch to show it

STROKES: Final = (4, 10)  # least, and one more than the most, in a background
GLYPH_SIZES: Final = (14, 16, 18, 20)
INK: Final = 0.35  # a glyph's box holds the pixels at least this opaque
GAP: Final = 2  # pixels between the boxes of two digits
RGB: Final = np.array(
    [
        [0.90, 0.15, 0.15],
        [0.15, 0.80, 0.20],
        [0.20, 0.35, 1.00],
        [0.95, 0.90, 0.15],
        [0.80, 0.25, 0.85],
        [0.95, 0.95, 0.95],
    ],
    np.float32,
)


@dataclass(frozen=True)
class Digit:
    """One digit of a scene: its class 0-9, the index of its colour, its box in pixels."""

    label: int
    colour: int
    box: Box

    @property
    def centre(self) -> tuple[float, float]:
        """Centre of the box in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True, eq=False)
class Scene:
    """Pixels float32 (96, 96, 3) in [0, 1], the digits, the index of the background's texture."""

    pixels: Floats
    digits: tuple[Digit, ...]
    texture: int

    def image(self) -> Image.Image:
        """The scene as an 8-bit RGB picture."""
        return Image.fromarray((self.pixels * 255).round().astype(np.uint8))


def draw(
    rng: np.random.Generator,
    split: Split,
    count: tuple[int, int],
    paired: bool,
    strokes: tuple[int, int] = STROKES,
) -> Scene:
    """Draw a scene of `count` (least, most) digits whose images come from one split.

    Digits that find no free place are left out. `paired` scenes have distinct classes and
    colours mostly in pairs, so that questions through a shared colour abound; the others are
    random with repeats.
    """
    texture = int(rng.integers(len(TEXTURES)))
    pixels = _background(rng, texture, strokes)
    number = int(rng.integers(count[0], count[1] + 1))
    placed: list[Digit] = []
    for label, colour in _paired(rng, number) if paired else _mixed(rng, number):
        digit = _place(rng, pixels, label, colour, split, placed)
        if digit is not None:
            placed.append(digit)
    pixels += 0.03 * rng.standard_normal(pixels.shape, dtype=np.float32)
    return Scene(pixels.clip(0, 1), tuple(placed), texture)


def coverage(box: Box) -> Floats:
    """Share of every patch's area that lies in a box: float32 (GRID, GRID), rows first."""
    edges = np.arange(GRID, dtype=np.float32) * PATCH
    across = np.minimum(edges + PATCH, box[2]) - np.maximum(edges, box[0])
    down = np.minimum(edges + PATCH, box[3]) - np.maximum(edges, box[1])
    shares = np.outer(down.clip(0), across.clip(0)) / PATCH**2
    return shares.astype(np.float32)


def _mixed(rng: np.random.Generator, number: int) -> list[tuple[int, int]]:
    """Random (label, colour) pairs from a subset of both, so that repeats are common."""
    colours = rng.permutation(len(COLOURS))[: rng.integers(3, 6)]
    labels = rng.permutation(len(DIGITS))[: rng.integers(4, 9)]
    return [(int(rng.choice(labels)), int(rng.choice(colours))) for _ in range(number)]


def _paired(rng: np.random.Generator, number: int) -> list[tuple[int, int]]:
    """(label, colour) pairs: labels distinct, as many colours as possible shared by two digits."""
    pairs = number // 2
    if rng.random() >= 0.7:  # sometimes fewer pairs, but never more groups than colours
        pairs = int(rng.integers(max(1, number - len(COLOURS)), pairs + 1))
    doubled = [group for group in range(pairs) for _ in range(2)]
    groups = [*doubled, *range(pairs, number - pairs)]
    colours, labels = rng.permutation(len(COLOURS)), rng.permutation(len(DIGITS))
    content = [(int(labels[i]), int(colours[group])) for i, group in enumerate(groups)]
    return [content[i] for i in rng.permutation(number)]


def _background(rng: np.random.Generator, texture: int, strokes: tuple[int, int]) -> Floats:
    """A tinted texture with translucent strokes of clutter, float32 (SIDE, SIDE, 3)."""
    period, phase, strength = rng.uniform(7, 12), rng.uniform(0, 2 * np.pi), rng.uniform(0.06, 0.12)
    wave = np.sin(np.arange(SIDE) * (2 * np.pi / period) + phase)
    across, down = wave[None, :], wave[:, None]
    pattern = (
        np.zeros((1, 1)),
        np.sign(down),
        np.sign(across),
        np.sign(across * down),
        2.0 * ((across > 0.5) & (down > 0.5)),
    )[texture]
    pixels = np.empty((SIDE, SIDE, 3), np.float32)
    pixels[:] = (strength * pattern)[..., None]
    pixels += rng.uniform(0.12, 0.38, 3).astype(np.float32)
    for _ in range(rng.integers(*strokes)):
        x, y = rng.integers(0, SIDE - 4, 2)
        long, short = rng.integers(2, 16), rng.integers(1, 4)
        width, height = (short, long) if rng.random() < 0.5 else (long, short)
        stroke = pixels[y : y + height, x : x + width]
        stroke += 0.5 * (rng.uniform(0.1, 0.7, 3).astype(np.float32) - stroke)
    return pixels


@cache
def _glyphs(size: int) -> Floats:
    """All digit images at one size: opacity, float32 (1797, size, size)."""
    images = digits.load()[0].astype(np.float32) / 16
    bicubic = Image.Resampling.BICUBIC
    enlarged = [Image.fromarray(image).resize((size, size), bicubic) for image in images]
    return np.stack([np.asarray(image) for image in enlarged]).clip(0, 1)


def _distorted(rng: np.random.Generator, index: int, size: int) -> Floats:
    """One digit image at one size, a little turned, slanted and squeezed: (size, size).

    For training only: nine writers are few, and the other splits hold other writers.
    """
    image = digits.load()[0][index].astype(np.float32) / 16
    angle, slant, wide, high = rng.uniform((-0.12, -0.15, 0.95, 0.95), (0.12, 0.15, 1.15, 1.15))
    scale, middle = len(image) / size, len(image) / 2
    # Output pixels are mapped to input pixels: squeeze, slant, turn; centre to centre.
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    a, b = cos * wide, (cos * slant - sin) * high
    d, e = sin * wide, (sin * slant + cos) * high
    c, f = middle - (a + b) * size / 2, middle - (d + e) * size / 2
    coefficients = (a, b, c, d, e, f)
    warped = Image.fromarray(image).transform(
        (size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC
    )
    return np.asarray(warped).clip(0, 1)


def _ink(opacity: Floats) -> tuple[int, int, int, int]:
    """Box of a glyph's ink."""
    ink = opacity > INK
    columns, rows = np.flatnonzero(ink.any(0)), np.flatnonzero(ink.any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _place(
    rng: np.random.Generator,
    pixels: Floats,
    label: int,
    colour: int,
    split: Split,
    placed: Sequence[Digit],
) -> Digit | None:
    """Paint one digit at a random free place; None when 60 tries find none."""
    candidates = digits.indices(split, label)
    index = int(candidates[rng.integers(len(candidates))])
    size = GLYPH_SIZES[rng.integers(len(GLYPH_SIZES))]
    glyph = _distorted(rng, index, size) if split == "train" else _glyphs(size)[index]
    x0, y0, x1, y1 = _ink(glyph)
    for x, y in rng.integers(0, SIDE - size + 1, (60, 2)).tolist():
        box = (x0 + x, y0 + y, x1 + x, y1 + y)
        if any(_close(box, other.box) for other in placed):
            continue
        shade = RGB[colour] + 0.06 * rng.standard_normal(3, dtype=np.float32)
        area = pixels[y : y + size, x : x + size]
        area += glyph[..., None] * (shade.clip(0, 1) - area)
        return Digit(label, colour, box)
    return None


def _close(a: Box, b: Box) -> bool:
    """Whether two boxes overlap or leave less than GAP pixels between them."""
    apart_x = a[0] >= b[2] + GAP or b[0] >= a[2] + GAP
    apart_y = a[1] >= b[3] + GAP or b[1] >= a[3] + GAP
    return not (apart_x or apart_y)
