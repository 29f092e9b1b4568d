"""What orders the candidates of a decision: one file each. ``ScoreRanker`` is the base of your own."""

from __future__ import annotations

from ..core.ranking import RankContext, Ranker
from .attention import LastTokenAttention
from .base import RankInputs, ScoreRanker
from .random import RandomScores

__all__ = ["RANKERS", "LastTokenAttention", "RandomScores", "RankContext", "RankInputs", "Ranker", "ScoreRanker"]

RANKERS: dict[str, type[Ranker]] = {"last_token_attention": LastTokenAttention, "random_scores": RandomScores}
"""Every ranker that a stored ``RoutingConfig`` can name. Register your own here."""
