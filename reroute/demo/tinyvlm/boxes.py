"""Boxes in pixels (x0, y0, x1, y1), the ends exclusive, and their form in answers: four location bins."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from . import vocabulary as vocab

Box = tuple[float, float, float, float]

BIN: Final = 3  # pixels of a location bin
IOU: Final = 0.5  # a box is right when it overlaps the target's at least this much
_LOCATION: Final = re.compile(r"<(\d+)>")


def to_bins(box: Box) -> tuple[int, int, int, int]:
    """Location bins of a box: the first and the last bin it covers, per axis, rounded."""
    x0, y0, x1, y1 = (round(edge / BIN) for edge in box)
    return _clamp(x0), _clamp(y0), _clamp(x1 - 1), _clamp(y1 - 1)


def _clamp(value: int) -> int:
    return min(vocab.LOCATIONS - 1, max(0, value))


def from_bins(bins: Sequence[int]) -> Box:
    """Box in pixels that covers the location bins `to_bins` gave."""
    x0, y0, x1, y1 = bins
    return x0 * BIN, y0 * BIN, (x1 + 1) * BIN, (y1 + 1) * BIN


def answer_box(answer: str | Iterable[int]) -> Box | None:
    """Box in pixels of an answer, text or token ids; None unless it starts with a proper box."""
    words = answer.split() if isinstance(answer, str) else vocab.text(answer).split()
    matches = [_LOCATION.fullmatch(word) for word in words[:4]]
    bins = [int(match[1]) for match in matches if match]
    if len(bins) < 4 or max(bins) >= vocab.LOCATIONS or bins[0] > bins[2] or bins[1] > bins[3]:
        return None
    return from_bins(bins)


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    total = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return shared / (total - shared)
