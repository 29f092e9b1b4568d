"""What orders the candidates of a decision: one file each. ``ScoreRanker`` is the base of your own."""

from __future__ import annotations

from ..registry import Registry
from .attention import LastTokenAttention
from .base import DecoderAdapter, Merge, RankContext, Ranker
from .baselines import Deviation, EvenlySpaced, Norm
from .conditional_diversity import ClipRelevance, ConditionalDiversity
from .dense_attention import DenseAttention, RecordedAttention
from .diversity import Diversity
from .dominant_contextual import DominantContextual
from .duplication import Duplication
from .folded import FoldedAttention
from .last_rows import LastRowsAttention
from .local_global import LocalGlobal
from .max_min_distance import MaxMinDistance
from .random import RandomScores
from .rater_attention import RaterAttention
from .region_anchors import RegionAnchors
from .scores import RankInputs, ScoreRanker
from .vision import Grid, TowerShape, Vision

__all__ = [
    "RANKERS",
    "ClipRelevance",
    "ConditionalDiversity",
    "DecoderAdapter",
    "DenseAttention",
    "Deviation",
    "Diversity",
    "DominantContextual",
    "Duplication",
    "EvenlySpaced",
    "FoldedAttention",
    "Grid",
    "LastRowsAttention",
    "LastTokenAttention",
    "LocalGlobal",
    "MaxMinDistance",
    "Merge",
    "Norm",
    "RandomScores",
    "RankContext",
    "RankInputs",
    "Ranker",
    "RaterAttention",
    "RecordedAttention",
    "RegionAnchors",
    "ScoreRanker",
    "TowerShape",
    "Vision",
]

RANKERS: Registry[Ranker] = Registry(
    "ranker",
    "reroute.rankers",
    {
        "conditional_diversity": ConditionalDiversity,
        "deviation": Deviation,
        "diversity": Diversity,
        "dominant_contextual": DominantContextual,
        "duplication": Duplication,
        "evenly_spaced": EvenlySpaced,
        "folded_attention": FoldedAttention,
        "last_rows_attention": LastRowsAttention,
        "last_token_attention": LastTokenAttention,
        "local_global": LocalGlobal,
        "max_min_distance": MaxMinDistance,
        "norm": Norm,
        "random_scores": RandomScores,
        "rater_attention": RaterAttention,
        "region_anchors": RegionAnchors,
    },
)
"""Every ranker that a stored ``RoutingConfig`` or ``Schedule`` can name. Register your own here."""
