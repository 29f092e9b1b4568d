"""Attention of the last rows of the prompt, by the head that pays most: the second stage of Nüwa for Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from reroute_kernels import Selection
from reroute_kernels.reference import rotate

from ..checks import is_count, shown
from ..errors import RerouteError
from .base import RankContext, Ranker

if TYPE_CHECKING:
    from ..core.cost import ModelShape

__all__ = ["LastRowsAttention", "causal_attention", "last_rows"]


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
        rows, counts, scores = context.rows, context.rows.metadata, []
        asked = [
            min(self.rows, length) if n else 0 for length, n in zip(counts.kv_lens, counts.num_candidates, strict=True)
        ]
        for b, sample in enumerate(last_rows(context, asked)):
            weights = causal_attention(*sample).index_select(2, rows.candidates[b, : counts.num_candidates[b]])
            scores.append(weights.mean(1).amax(0))
        return context.best(scores)

    def flops(self, shape: ModelShape, rows: int, candidates: int, k: int) -> int:
        """The query rows, the keys of all ``rows``, and their logits."""
        d, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        return 2 * self.rows * d * q + 2 * rows * d * kv + 2 * self.rows * q * rows


def last_rows(context: RankContext, counts: Sequence[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """Of each sample, the queries (r, H, D) of the last r = ``counts[b]`` of the L rows that its query sees, the keys
    (L, G, D) of all these rows, both rotated, and the scale of their products. Asks for ``normed``."""
    adapter, layer, (cos, sin, _) = context.adapter, context.decision.score_layer, context.tables
    starts, lengths = context.rows.metadata.starts, context.rows.metadata.kv_lens
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    asked = [torch.arange(end - r, end, device=cos.device) for end, r in zip(ends, counts, strict=True)]
    queries, keys = adapter.project(layer, context.normed(), context.tables._replace(query_rows=torch.cat(asked)))
    queries, keys, spec = queries.to(cos.device), keys.to(cos.device), adapter.attention_spec(layer)
    for start, end, at, query in zip(starts, ends, asked, queries.split(list(counts)), strict=True):
        its = keys[start:end] if spec.key_norm is None else spec.key_norm(keys[start:end])
        rotated = rotate(query, cos.index_select(0, at), sin.index_select(0, at), spec.rope)
        yield rotated, rotate(its, cos[start:end], sin[start:end], spec.rope), spec.scale


def causal_attention(query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """(H, r, L) fp32, of the queries (r, H, D) of the last r of L tokens to the keys (L, G, D) of all."""
    wide = keys.float().repeat_interleave(query.shape[1] // keys.shape[1], 1)
    logits = query.float().transpose(0, 1) @ wide.permute(1, 2, 0) * scale
    later = torch.ones_like(logits[0], dtype=torch.bool).triu(len(keys) - len(query) + 1)
    return logits.masked_fill(later, -torch.inf).softmax(-1)
