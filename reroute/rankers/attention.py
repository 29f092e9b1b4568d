"""Attention of the last prompt token, averaged over heads: the ranking of FastV and PDrop, in a fused kernel."""

from __future__ import annotations

from dataclasses import dataclass

from reroute_kernels import Selection

from ..core.ranking import RankContext, Ranker

__all__ = ["LastTokenAttention"]


@dataclass(frozen=True)
class LastTokenAttention(Ranker):
    """Score of a candidate: mean over heads of the attention that the last prompt token pays it in ``score_layer``."""

    scores_attention = True

    def select(self, context: RankContext) -> Selection:
        """See ``Ranker``."""
        adapter, layer, device = context.adapter, context.decision.score_layer, context.tables.cos.device
        query, keys = adapter.project(layer, context.normed(), context.tables.query_rows)
        if keys.device != device:
            query, keys = query.to(device), keys.to(device)
        return context.backend.score_topk(
            query,
            keys,
            context.tables,
            context.rows,
            adapter.attention_spec(layer),
        )
