"""One decision of a plan: before which layer, by which layer's attention, among how many, and how many stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..rankers import Ranker
    from .action import Action

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
    - ``action``: what becomes of the others.
    - ``left_by``: the stage whose decision left the rows that are scored, the last one before that removed any; -1 if
      none did, and all of the prompt is scored.
    """

    stage: int
    layer: int
    score_layer: int
    candidates: tuple[int, ...]
    k: tuple[int, ...]
    ranker: Ranker
    action: Action
    left_by: int

    @property
    def from_pool(self) -> bool:
        """Whether the rows of the whole prompt are scored, in the pool."""
        return self.left_by < 0
