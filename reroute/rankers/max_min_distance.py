"""Max-min distance: the ranking of DivPrune."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn.functional import normalize

from reroute_kernels import Selection

from .base import RankContext, Ranker

if TYPE_CHECKING:
    from ..core.cost import ModelShape

__all__ = ["MaxMinDistance", "max_min_picks"]


@dataclass(frozen=True)
class MaxMinDistance(Ranker):
    """Each pick is the candidate that is farthest from the nearest pick so far, by 1 - cosine of hidden states.

    The first pick is the candidate whose nearest other one is farthest. Picks are made one by one, in about five small
    operations each: for large k ``Diversity`` is far quicker.
    """

    needs_attention: ClassVar[bool] = False

    def select(self, context: RankContext) -> Selection:
        """See ``Ranker``."""
        samples = zip(context.candidates_of(context.hidden()), context.decision.k, strict=True)
        return context.best(_scores(hidden, k) for hidden, k in samples)

    def flops(self, shape: ModelShape, rows: int, candidates: int, k: int) -> int:
        """The cosines of all pairs for the first pick, those of one candidate for each of the others."""
        return 2 * candidates * shape.hidden * (candidates + max(0, k - 1))


def max_min_picks(hidden: torch.Tensor, k: int) -> torch.Tensor:
    """Indices (k,) of picks among ``hidden`` (N, C), in their order; of equals the first. Waits for no device."""
    unit = normalize(hidden.float(), dim=-1)
    picks: list[torch.Tensor] = []
    nearest = _nearest_other(unit) if k else unit.new_empty(0)
    distance = torch.full_like(nearest, torch.inf)
    for _ in range(k):
        picks.append(pick := nearest.argmax(0, keepdim=True))
        distance = torch.minimum(distance, 1 - unit @ unit.index_select(0, pick)[0])
        distance = distance.index_fill(0, pick, -torch.inf)  # those that are equal to a pick stay at a distance of 0
        nearest = distance
    return torch.cat(picks) if picks else torch.empty(0, dtype=torch.int64, device=hidden.device)


def _scores(hidden: torch.Tensor, k: int) -> torch.Tensor:
    """k, k - 1, … for the picks in their order, 0 for all others."""
    picks = max_min_picks(hidden, k)
    ranks = torch.arange(k, 0, -1, dtype=torch.float32, device=hidden.device)
    return torch.zeros(len(hidden), device=hidden.device).index_copy(0, picks, ranks)


def _nearest_other(unit: torch.Tensor) -> torch.Tensor:
    """Distance (N,) of each to the nearest other one; block by block, as all pairs may not fit."""
    others = []
    for start in range(0, len(unit), 1024):
        cosines = unit[start : start + 1024] @ unit.T
        cosines.diagonal(start).fill_(-torch.inf)
        others.append(1 - cosines.amax(1))
    return torch.cat(others)
