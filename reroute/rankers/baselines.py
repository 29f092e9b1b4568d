"""Baselines that any ranking has to beat, besides chance: they see no question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import normalize

from reroute_kernels import Selection

from .base import RankContext, Ranker
from .scores import RankInputs, ScoreRanker

__all__ = ["Deviation", "EvenlySpaced", "Norm"]


@dataclass(frozen=True)
class Norm(ScoreRanker):
    """The larger its hidden state, the better."""

    def scores(self, inputs: RankInputs) -> list[torch.Tensor]:
        """See ``ScoreRanker``."""
        return [hidden.float().norm(dim=-1) for hidden in inputs.hidden]


@dataclass(frozen=True)
class Deviation(ScoreRanker):
    """The further the direction of its hidden state is from the mean direction, the better."""

    def scores(self, inputs: RankInputs) -> list[torch.Tensor]:
        """See ``ScoreRanker``."""
        directions = [normalize(hidden.float(), dim=-1) for hidden in inputs.hidden]
        return [(unit - unit.mean(0)).norm(dim=-1) for unit in directions]


@dataclass(frozen=True)
class EvenlySpaced(Ranker):
    """Every N / k-th candidate in prompt order: on a picture a grid, which is what a lower resolution would keep."""

    needs_attention: ClassVar[bool] = False

    def select(self, context: RankContext) -> Selection:
        """See ``Ranker``."""
        device = context.rows.candidates.device
        counts = zip(context.rows.metadata.num_candidates, context.decision.k, strict=True)
        return context.best(_steps(n, k, device) for n, k in counts)


def _steps(n: int, k: int, device: torch.device) -> torch.Tensor:
    """1 at ``k`` of ``n`` places, evenly spaced, else 0."""
    reached = (2 * k * torch.arange(n + 1, device=device) + n) // max(1, 2 * n)
    return reached.diff().float()
