"""Random: the chance baseline that any ranking has to beat."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..rankers import RandomScores, Ranker
from .fastv import FastV

__all__ = ["Random"]


@dataclass(frozen=True)
class Random(FastV):
    """FastV's schedule with random scores; ``Random(ranker=RandomScores(seed=1))`` is another draw."""

    name = "random"

    ranker: Ranker = field(default=RandomScores(), kw_only=True)
