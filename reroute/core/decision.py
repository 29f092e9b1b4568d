"""One decision of a plan: before which layer, by which layer's attention, among how many, and how many stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..rankers import Ranker

__all__ = ["Decision"]


@dataclass(frozen=True)
class Decision:
    """A decision, and with it the stage that it begins; tuples have one entry per sample.

    - ``stage``: its number, from 0.
    - ``layer``: the routing layer, the first one that runs on the result.
    - ``score_layer``: the layer before which it is made, on whose input.
    - ``ranker``: what orders the candidates.
    - ``candidates``: visual tokens that compete.
    - ``k``: how many of them stay.
    - ``from_pool``: whether the rows of the whole prompt are scored, in the pool; else the compact rows of the stage
      that ends. ``route`` always scores the whole prompt. ``remove`` does so once; later only survivors are left.
    """

    stage: int
    layer: int
    score_layer: int
    candidates: tuple[int, ...]
    k: tuple[int, ...]
    from_pool: bool
    ranker: Ranker
