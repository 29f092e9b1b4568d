"""Questions with known answers: one question about each picture, the same ones for the same arguments.

Tune on `validation`; the images of `test` are for one final figure.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from PIL import Image

from .boxes import Box
from .digits import Split
from .questions import KINDS, Question, ask
from .scenes import STROKES, Digit, Scene, draw

COUNTS: Final[dict[str, int]] = {
    "attr": 100,
    "ext": 100,
    "hop": 120,
    "hopext": 80,
    "col": 40,
    "cls": 40,
    "exist": 40,
    "count": 40,
    "bg": 40,
    "hopcls": 160,
    "riddle": 200,
    "riddlecol": 160,
}

CLUTTER: Final = (20, 40)
"""As `scenes.STROKES`."""


@dataclass(frozen=True)
class Example:
    """One question about one picture.

    `box` is the target's, also where the answer is a word about the target; None where no digit
    is meant. `digits` are all of the picture's, `target` and `referent` index them.
    """

    image: Image.Image
    question: str
    kind: str
    family: str
    answer: str
    box: Box | None
    digits: tuple[Digit, ...] = field(default=(), repr=False)
    target: int | None = None
    referent: int | None = None


def examples(
    split: Split = "test", counts: Mapping[str, int] | None = None, seed: int = 777, clutter: bool = False
) -> list[Example]:
    """So many examples of each kind, one per picture, by default `COUNTS`.

    Deterministic: the first n of a kind do not depend on the other kinds nor on how many follow. `clutter` asks about
    fuller pictures than any of the training: 9 or 10 digits, and `CLUTTER` strokes behind them.
    """
    counts = COUNTS if counts is None else counts
    known = [kind for kind, about in KINDS.items() if about.family != "curriculum"]
    for kind in counts:
        if kind not in known:
            raise ValueError(f"unknown kind {kind!r}; known kinds are {', '.join(known)}")
    return [e for kind, count in counts.items() for e in _of_kind(split, kind, count, seed, clutter)]


def _of_kind(split: Split, kind: str, count: int, seed: int, clutter: bool) -> list[Example]:
    name = f"{split} {kind}{' clutter' * clutter}".encode()
    rng = np.random.default_rng([seed, zlib.crc32(name)])
    paired = KINDS[kind].paired
    number, strokes = ((4, 8) if paired else (5, 8), STROKES) if not clutter else ((9, 10), CLUTTER)
    found: list[Example] = []
    while len(found) < count:
        scene = draw(rng, split, number, paired, strokes)
        choices = ask(scene, kind, rng)
        if choices:
            found.append(_example(scene, choices[int(rng.integers(len(choices)))]))
    return found


def _example(scene: Scene, question: Question) -> Example:
    return Example(
        image=scene.image(),
        question=question.text,
        kind=question.kind,
        family=KINDS[question.kind].family,
        answer=" ".join(question.answer),
        box=None if question.target is None else scene.digits[question.target].box,
        digits=scene.digits,
        target=question.target,
        referent=question.referent,
    )
