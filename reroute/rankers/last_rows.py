"""Attention of the last rows of the prompt, by the head that pays most: the second stage of Nüwa for Qwen2.5-VL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from reroute_kernels import AttentionSpec, Selection
from reroute_kernels.reference import rotate

from ..checks import is_count, shown
from ..errors import RerouteError
from .base import RankContext, Ranker

if TYPE_CHECKING:
    from ..core.cost import ModelShape

__all__ = ["LastRowsAttention"]


@dataclass(frozen=True)
class LastRowsAttention(Ranker):
    """Score of a candidate: the largest over heads of the mean attention that the last ``rows`` prompt tokens pay it.

    - ``layer_offset``: see ``LastTokenAttention``.

    In plain PyTorch: it holds the attention of these rows, heads x rows x tokens.
    """

    rows: int = 3
    layer_offset: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not is_count(self.rows) or self.layer_offset not in (0, -1):
            raise RerouteError(
                "LastRowsAttention takes a number of rows and a layer_offset of 0 or -1, not "
                f"rows={shown(self.rows)}, layer_offset={shown(self.layer_offset)}."
            )

    def select(self, context: RankContext) -> Selection:
        """See ``Ranker``."""
        adapter, layer, (cos, sin, last) = context.adapter, context.decision.score_layer, context.tables
        counts = context.rows.metadata
        # A prompt of fewer tokens has rows before its own here, which are not read.
        rows = (last[:, None] - torch.arange(self.rows - 1, -1, -1, device=last.device)).clamp(min=0)
        queries, keys = adapter.project(layer, context.normed(), rows.flatten())
        queries, keys = queries.to(cos.device).unflatten(0, rows.shape), keys.to(cos.device)
        spec, scores = adapter.attention_spec(layer), []
        for b, (start, length, n) in enumerate(zip(counts.starts, counts.kv_lens, counts.num_candidates, strict=True)):
            own, span = slice(max(0, self.rows - length), None), slice(start, start + length)
            if not n:
                scores.append(cos.new_empty(0))
                continue
            at = rows[b, own]
            query = rotate(queries[b, own], cos.index_select(0, at), sin.index_select(0, at), spec.rope)
            its = keys[span] if spec.key_norm is None else spec.key_norm(keys[span])
            weights = _attention(query, rotate(its, cos[span], sin[span], spec.rope), spec)
            scores.append(weights.mean(1).amax(0).index_select(0, context.rows.candidates[b, :n]))
        return context.best(scores)

    def flops(self, shape: ModelShape, rows: int, candidates: int, k: int) -> int:
        """The query rows, the keys of all ``rows``, and their logits."""
        d, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        return 2 * self.rows * d * q + 2 * rows * d * kv + 2 * self.rows * q * rows


def _attention(query: torch.Tensor, keys: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    """(H, r, L) of the rotated queries (r, H, D) of the last r of L tokens to their rotated keys (L, G, D), causal."""
    wide = keys.float().repeat_interleave(query.shape[1] // keys.shape[1], 1)
    logits = query.float().transpose(0, 1) @ wide.permute(1, 2, 0) * spec.scale
    later = torch.ones_like(logits[0], dtype=torch.bool).triu(len(keys) - len(query) + 1)
    return logits.masked_fill(later, -torch.inf).softmax(-1)
