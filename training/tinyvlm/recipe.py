"""The training recipe: every stage's data and settings, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from .packing import Mix


@dataclass(frozen=True)
class Ramp:
    """A value that moves linearly between (share of the stage done, value) points."""

    points: tuple[tuple[float, float], ...]

    def at(self, done: float) -> float:
        """The value when the share `done` of the stage is done."""
        where, values = zip(*self.points, strict=True)
        return float(np.interp(done, where, values))


def ramp(start: float, end: float) -> Ramp:
    """From `start` to `end` over the whole stage."""
    return Ramp(((0.0, start), (1.0, end)))


# Least and most digits of a scene, from a share of the steps on.
Digits = tuple[tuple[float, tuple[int, int]], ...]


def digits_at(digits: Digits, done: float) -> tuple[int, int]:
    """Least and most digits when the share `done` of the steps is done."""
    return [count for start, count in digits if done >= start][-1]


OFF: Final = ramp(0.0, 0.0)
FULL: Final = ramp(1.0, 1.0)


@dataclass(frozen=True)
class Stage:
    """A number of optimiser steps on one mixture of questions, starting with a fresh optimiser."""

    name: str
    steps: int
    rate: float  # Muon's peak learning rate; AdamW's is half of it
    digits: Digits
    paired: float
    batch: int = 16
    decay_from: float = 1.0  # share of the stage after which the rate falls along a cosine
    query_last: Ramp = OFF
    hints: Ramp = OFF
    riddles: Ramp = FULL
    extremes: float = 0.0

    def mix(self, done: float) -> Mix:
        """The mixture when the share `done` of the stage is done."""
        return Mix(
            digits=digits_at(self.digits, done),
            paired=self.paired,
            query_last=self.query_last.at(done),
            hints=self.hints.at(done),
            riddles=self.riddles.at(done),
            extremes=self.extremes,
        )


@dataclass(frozen=True)
class PatchLabels:
    """The tower learns from the class, colour and box of what lies in each patch."""

    steps: int
    batch: int
    rate: float


@dataclass(frozen=True)
class TextSupervision:
    """The tower learns from captions of images and from answers to questions; no loss knows what lies in a patch."""

    steps: int
    batch: int
    rate: float
    digits: Digits
    decay_from: float  # share of the steps after which the rate falls linearly


@dataclass(frozen=True)
class Recipe:
    """All of the training. Every step's data follow from (seed, stage name, step)."""

    seed: int
    vision: PatchLabels | TextSupervision
    stages: tuple[Stage, ...]


LABELS: Final = Recipe(
    seed=0,
    vision=PatchLabels(steps=1000, batch=48, rate=4e-3),
    stages=(
        # One-hop questions. Query words last first: then the token that answers is the one that
        # names the digit. Riddles join once the easy questions begin to work.
        Stage(
            "bind",
            steps=1200,
            rate=4e-3,
            digits=((0.0, (2, 4)), (0.15, (4, 6)), (0.3, (5, 8))),
            paired=0.0,
            decay_from=0.55,
            query_last=Ramp(((0.3, 0.7), (0.65, 0.0))),
            riddles=Ramp(((0.4, 0.0), (0.6, 1.0))),
        ),
        # Two-hop questions, most with the first look-up given in words, in scenes of few digits.
        Stage(
            "warm",
            steps=250,
            rate=3e-3,
            digits=((0.0, (3, 4)),),
            paired=0.6,
            query_last=ramp(0.40, 0.17),
            hints=ramp(1.0, 0.7),
        ),
        # The smallest scenes: the word "seven" must find its digit and hold its colour.
        Stage(
            "words",
            steps=200,
            rate=3e-3,
            digits=((0.0, (3, 3)), (0.9, (3, 4))),
            paired=0.7,
            hints=ramp(0.80, 0.62),
        ),
        # Many pairs in a scene: now only the referent tells which of many digits is meant.
        Stage(
            "twohop_a",
            steps=250,
            rate=3e-3,
            digits=((0.0, (6, 8)),),
            paired=0.8,
            query_last=ramp(0.5, 0.3),
            hints=ramp(0.50, 0.33),
        ),
        Stage(
            "twohop_b",
            steps=150,
            rate=3e-3,
            digits=((0.0, (6, 8)),),
            paired=0.7,
            query_last=ramp(0.17, 0.0),
            hints=ramp(0.22, 0.08),
        ),
        # The final mixture, long, with the learning rate going down.
        Stage(
            "final",
            steps=1500,
            rate=3e-3,
            digits=((0.0, (5, 8)), (0.3, (4, 8))),
            paired=0.5,
            decay_from=0.25,
            hints=Ramp(((0.0, 0.07), (0.15, 0.0))),
            extremes=1.0,
        ),
    ),
)

# The same stages from another seed, with a tower that is taught by text alone.
TEXT: Final = replace(
    LABELS,
    seed=1,
    vision=TextSupervision(
        steps=2500,
        batch=48,
        rate=4e-3,
        # One digit: what any text means. Then what each of several texts means.
        digits=((0.0, (1, 1)), (0.08, (3, 6)), (0.32, (4, 8))),
        decay_from=0.5,
    ),
)

RECIPES: Final = {"labels": LABELS, "text": TEXT}


def shortened(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with `steps` steps in every stage: for smoke tests."""
    stages = tuple(replace(stage, steps=steps) for stage in recipe.stages)
    return replace(recipe, vision=replace(recipe.vision, steps=steps), stages=stages)
