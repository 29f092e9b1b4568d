"""Attention of the last prompt token, averaged over heads: the ranking of FastV and PDrop, in a fused kernel."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from reroute_kernels import Backend, Selection

from ..checks import shown, whole
from ..errors import RerouteError
from .base import RankContext, Ranker

if TYPE_CHECKING:
    from ..core.cost import ModelShape

__all__ = ["LastTokenAttention"]


@dataclass(frozen=True)
class LastTokenAttention(Ranker):
    """Score of a candidate: mean over heads of the attention that the last prompt token pays it.

    - ``layer_offset``: 0 scores with the routing layer's own query and keys, on its input; -1 with those of the layer
      before (FastV's original).
    - ``rotates``: whether query and keys are rotated by their positions, as in the layer (VScan for Qwen2.5-VL: not).
    """

    layer_offset: int = 0
    rotates: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        """Check the settings."""
        if not isinstance(self.rotates, bool):
            raise RerouteError(f"rotates is True or False, not {shown(self.rotates)}.")
        try:
            object.__setattr__(self, "layer_offset", whole(self.layer_offset))
        except TypeError:
            object.__setattr__(self, "layer_offset", 1)
        if self.layer_offset not in (0, -1):
            raise RerouteError(
                "layer_offset must be 0 (score with the routing layer) or -1 (with the layer before it), not "
                f"{shown(self.layer_offset)}."
            )

    def within_capacities(self, backend: Backend) -> bool:
        """See ``Ranker``."""
        return True

    def select(self, context: RankContext) -> Selection:
        """See ``Ranker``."""
        adapter, layer, device = context.adapter, context.decision.score_layer, context.tables.cos.device
        tables = context.tables if self.rotates else context.tables.unrotated()
        query, keys = adapter.project_own(layer, context.normed(), tables)
        if keys.device != device:
            query, keys = query.to(device), keys.to(device)
        return context.backend.score_topk(
            query,
            keys,
            tables,
            context.rows,
            adapter.attention_spec(layer),
        )

    def flops(self, shape: ModelShape, rows: int, candidates: int, k: int) -> int:
        """One query row, the keys of all ``rows``, and their logits."""
        d, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        return 2 * d * q + 2 * rows * d * kv + 2 * q * rows
