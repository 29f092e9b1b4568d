"""Attention of the words that the picture speaks to: the ranking of SparseVLM."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

from reroute_kernels import Selection

from ..checks import check_name, shown
from ..errors import RerouteError
from .base import Merge, RankContext, Ranker
from .last_rows import causal_attention, last_rows
from .recycling import num_kept, num_recycled, recycle

if TYPE_CHECKING:
    from ..core.cost import ModelShape

__all__ = ["RaterAttention", "by_raters", "mean_of_heads", "raters_of", "rope_of_ones"]

Version = Literal["1.5", "2.0"]

HEADS = 14
"""How many heads version 2.0 listens to."""


@dataclass(frozen=True)
class RaterAttention(Ranker):
    """Score of a candidate: the attention that the raters pay it, mean over raters and heads.

    Raters are those tokens of the question to which the embeddings of the visual tokens are most alike: chosen once per
    prompt, on the input of layer 0.

    - ``version``: ``"1.5"`` recycles what a removal prunes (``reroute.rankers.recycling``). ``"2.0"`` does not; it
      divides attention by what RoPE makes of vectors of ones, and listens to the 14 heads whose raters attend to the
      picture most.
    - ``layer_offset``: -1 scores with the layer before the routing layer, as released, 0 with the routing layer.

    In plain PyTorch: it holds the attention of the question's tokens, by the heads that share a key at a time.
    """

    version: Version = "1.5"
    layer_offset: int = -1

    def __post_init__(self) -> None:
        """Check the settings."""
        check_name("version", self.version, get_args(Version))
        if self.layer_offset not in (0, -1):
            raise RerouteError(f"RaterAttention takes a layer_offset of 0 or -1, not {shown(self.layer_offset)}.")

    def looks_before(self, layer: int) -> Collection[int]:
        """See ``Ranker``."""
        return (0,)

    def note(self, context: RankContext) -> list[torch.Tensor]:
        """The raters of each sample: see ``raters_of``."""
        hidden = context.hidden()
        samples = zip(context.candidates_of(hidden), context.questions_of(hidden), strict=True)
        return [raters_of(visual, question) for visual, question in samples]

    def decide(self, context: RankContext) -> tuple[Selection, Merge | None]:
        """See ``Ranker``. What a route defers is not lost, and nothing is recycled."""
        selection, decision = self.select(context), context.decision
        counts = list(zip(decision.candidates, decision.k, strict=True))
        if self.version == "2.0" or decision.action == "route" or all(num_kept(n, k) == k for n, k in counts):
            return selection, None

        def merge(hidden: torch.Tensor) -> torch.Tensor:
            merged = hidden.new_zeros(*selection.kept.shape, hidden.shape[-1])
            for b, (states, (n, k)) in enumerate(zip(context.candidates_of(hidden), counts, strict=True)):
                order = selection.scores[b, :n].sort(descending=True, stable=True).indices
                merged[b, :k] = recycle(states, order, k).index_select(0, selection.kept[b, :k])
            return merged

        return selection, merge

    def select(self, context: RankContext) -> Selection:
        """See ``Ranker``."""
        counts, scores = context.rows.metadata, []
        samples = zip(last_rows(context, context.questions), counts.starts, counts.num_candidates, strict=True)
        for b, ((queries, keys, scale), start, n) in enumerate(samples):
            visual, raters, heads = context.rows.candidates[b, :n], context.notes[0][b], []
            question, divisor = slice(start + len(keys) - len(queries), start + len(keys)), None
            if self.version == "2.0":
                cos, sin = context.tables.cos.float(), context.tables.sin.float()
                divisor = rope_of_ones(cos[question], sin[question], cos[start + visual], sin[start + visual])
            for query, key in zip(queries.chunk(keys.shape[1], 1), keys.chunk(keys.shape[1], 1), strict=True):
                attention = causal_attention(query, key, scale).index_select(2, visual)
                heads.append(by_raters(attention, raters, divisor))
            scores.append(mean_of_heads(torch.cat(heads), HEADS if self.version == "2.0" else None))
        return context.best(scores)

    def flops(self, shape: ModelShape, rows: int, candidates: int, k: int) -> int:
        """The keys of all ``rows``, queries and logits of the text, as if all of it came behind the picture; and the
        distances of what a removal recycles."""
        d, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        text, pruned = rows - candidates, candidates - num_kept(candidates, k)
        recycled = num_recycled(pruned) if pruned and self.version == "1.5" else 0
        return 2 * text * d * q + 2 * rows * d * kv + 2 * text * q * rows + 2 * recycled**2 * d

    def note_flops(self, shape: ModelShape, rows: int, candidates: int) -> int:
        """The products of the embeddings of the visual tokens and the text, as if all of it came behind the picture."""
        return 2 * (rows - candidates) * candidates * shape.hidden


def raters_of(visual: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
    """Which tokens of a ``question`` (T, C) are raters of the ``visual`` tokens (N, C), (T,) bool.

    Each visual token shares a weight of 1 among the question's tokens, by a softmax over their products. Raters have
    more than the average; if none has, as where there is one token, all are raters.
    """
    weights = (visual.float() @ question.float().T).softmax(1).mean(0)
    stands_out = weights > weights.mean()
    return stands_out | ~stands_out.any()


def rope_of_ones(cos: torch.Tensor, sin: torch.Tensor, key_cos: torch.Tensor, key_sin: torch.Tensor) -> torch.Tensor:
    """(T, N): the logits of queries at T places and keys at N, by their tables (T, D) and (N, D), if all were ones."""
    products: torch.Tensor = (cos @ key_cos.T + sin @ key_sin.T) / cos.shape[1] ** 0.5
    return products


def by_raters(attention: torch.Tensor, raters: torch.Tensor, divisor: torch.Tensor | None = None) -> torch.Tensor:
    """(H, N): the mean over ``raters`` (T,) of ``attention`` (H, T, N), over a ``divisor`` (T, N) if there is one."""
    shares = raters.float() / raters.sum()
    return shares @ (attention if divisor is None else attention / divisor)


def mean_of_heads(per_head: torch.Tensor, count: int | None = None) -> torch.Tensor:
    """(N,): the mean of ``per_head`` (H, N), or of the ``count`` heads that pay the picture most."""
    if count is not None:
        order = per_head.sum(1).sort(descending=True, stable=True).indices
        per_head = per_head.index_select(0, order[:count].sort().values)
    return per_head.mean(0)
