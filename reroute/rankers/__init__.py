"""What orders the candidates of a decision: one file each. ``ScoreRanker`` is the base of your own."""

from __future__ import annotations

from ..registry import Registry
from .attention import LastTokenAttention
from .base import DecoderAdapter, Merge, RankContext, Ranker
from .random import RandomScores
from .scores import RankInputs, ScoreRanker
from .vision import Grid, TowerShape, Vision

__all__ = [
    "RANKERS",
    "DecoderAdapter",
    "Grid",
    "LastTokenAttention",
    "Merge",
    "RandomScores",
    "RankContext",
    "RankInputs",
    "Ranker",
    "ScoreRanker",
    "TowerShape",
    "Vision",
]

RANKERS: Registry[Ranker] = Registry(
    "ranker", "reroute.rankers", {"last_token_attention": LastTokenAttention, "random_scores": RandomScores}
)
"""Every ranker that a stored ``RoutingConfig`` or ``Schedule`` can name. Register your own here."""
