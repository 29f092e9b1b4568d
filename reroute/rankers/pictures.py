"""What rankers share that choose among the tokens of each picture by itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from reroute_kernels import Selection

from ..errors import RerouteError
from .base import RankContext, Ranker
from .vision import Grid

__all__ = [
    "Picture",
    "albums",
    "best_of_regions",
    "best_tokens",
    "keep",
]


class Picture(NamedTuple):
    """One picture of a sample: ``tokens``, where it is among the sample's; ``kept``, where among those it keeps."""

    grid: Grid
    tokens: slice
    kept: slice

    @property
    def n(self) -> int:
        """Its tokens."""
        return self.grid[0] * self.grid[1]

    @property
    def k(self) -> int:
        """How many of them it keeps."""
        return int(self.kept.stop - self.kept.start)


def albums(ranker: Ranker, context: RankContext) -> list[list[Picture]]:
    """The pictures of each sample, of which the decision keeps as many of a hundred as of the others.

    Raises:
        RerouteError: not the decision before layer 0, so not all tokens of each picture may compete.
    """
    if context.decision.layer:
        raise RerouteError(
            f"{type(ranker).__name__} chooses among all tokens of a picture, as they come from the vision tower, so it "
            f"has to decide before layer 0, not before layer {context.decision.layer}."
        )
    return [_album(k, grids) for k, grids in zip(context.decision.k, context.vision.grids, strict=True)]


def keep(context: RankContext, chosen: Sequence[Sequence[torch.Tensor]], scores: Sequence[torch.Tensor]) -> Selection:
    """The selection of ``chosen`` (N_i,) bool, as many as are to be kept, of each picture of each sample.

    ``scores`` (N_b,) become those of the selection; those of tokens that are not chosen are lowered below all others.
    """
    return context.best(_lowered(its, score.float()) for its, score in zip(chosen, scores, strict=True))


def best_tokens(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Which of the tokens with these ``scores`` (N,) are the ``k`` best, (N,) bool; of equal ones the first."""
    order = scores.sort(descending=True, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).index_fill(0, order[:k], True)


def best_of_regions(scores: torch.Tensor, regions: torch.Tensor, k: int, per_region: int) -> torch.Tensor:
    """Which of the tokens with these ``scores`` (N,) are the ``k`` best of the ``per_region`` best of each region.

    Others only where those are too few; of equal ones the first. ``regions`` (N,) are their numbers, from 0. (N,) bool.
    """
    order = scores.float().sort(descending=True, stable=True).indices
    by_region = order[regions[order].sort(stable=True).indices]  # one after the other, each from its best on
    grouped, places = regions[by_region], torch.arange(len(order), device=order.device)
    ranks = torch.empty_like(places).scatter_(0, by_region, places - torch.searchsorted(grouped, grouped))
    order = order[(ranks[order] >= per_region).int().sort(stable=True).indices]
    return torch.zeros_like(scores, dtype=torch.bool).index_fill(0, order[:k], True)


def _lowered(chosen: Sequence[torch.Tensor], scores: torch.Tensor) -> torch.Tensor:
    if not chosen:
        return scores
    return torch.where(torch.cat(list(chosen)), scores, scores - (1 + scores.max() - scores.min()))


def _album(k: int, grids: Sequence[Grid]) -> list[Picture]:
    ends = list(accumulate((rows * columns for rows, columns in grids), initial=0))
    marks = [k * end // max(1, ends[-1]) for end in ends]
    places = zip(grids, pairwise(ends), pairwise(marks), strict=True)
    return [Picture(grid, slice(*tokens), slice(*kept)) for grid, tokens, kept in places]
