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


OFF: Final = ramp(0.0, 0.0)
FULL: Final = ramp(1.0, 1.0)


@dataclass(frozen=True)
class Stage:
    """A number of optimiser steps on one mixture of questions, starting with a fresh optimiser."""

    name: str
    steps: int
    rate: float  # Muon's peak learning rate; AdamW's is half of it
    digits: tuple[tuple[float, tuple[int, int]], ...]  # (from this share on, least and most)
    paired: float
    batch: int = 16
    decay_from: float = 1.0  # share of the stage after which the rate falls along a cosine
    query_last: Ramp = OFF
    hints: Ramp = OFF
    riddles: Ramp = FULL
    extremes: float = 0.0

    def mix(self, done: float) -> Mix:
        """The mixture when the share `done` of the stage is done."""
        digits = [count for start, count in self.digits if done >= start][-1]
        return Mix(
            digits=digits,
            paired=self.paired,
            query_last=self.query_last.at(done),
            hints=self.hints.at(done),
            riddles=self.riddles.at(done),
            extremes=self.extremes,
        )


@dataclass(frozen=True)
class Recipe:
    """All of the training. Every step's data follow from (seed, stage name, step)."""

    seed: int
    vision_steps: int
    vision_batch: int
    vision_rate: float
    stages: tuple[Stage, ...]


RECIPE: Final = Recipe(
    seed=0,
    vision_steps=1000,
    vision_batch=48,
    vision_rate=4e-3,
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


def shortened(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with `steps` steps in every stage: for smoke tests."""
    stages = tuple(replace(stage, steps=steps) for stage in recipe.stages)
    return replace(recipe, vision_steps=steps, stages=stages)
