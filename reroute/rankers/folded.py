"""Attention of the last prompt token without keys of visual tokens: the key projection is folded into the query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from reroute_kernels import RopeTables, Selection
from reroute_kernels.reference import rotate

from ..checks import is_count, shown
from ..errors import RerouteError
from .base import DecoderAdapter, RankContext, Ranker

if TYPE_CHECKING:
    from reroute_kernels.reference import Rope

    from ..core.cost import ModelShape

__all__ = ["FoldedAttention"]


@dataclass(frozen=True)
class FoldedAttention(Ranker):
    """The score of ``LastTokenAttention``, with one rotation for each ``run`` of candidates that follow one another.

    With R the mean rotation of a run, W the key projection of a head and q its rotated query, the logit of a candidate
    x is (W^T R^T q) . x: one product per run and head in place of a key per candidate. For run=1 nothing is
    approximated. Keys of text tokens are exact. It pays where query heads have key heads of their own; a key norm
    stands between W and q, so layers that have one are refused.

    - ``run``: 24 is a row of LLaVA-1.5's pictures.
    """

    run: int = 24

    def __post_init__(self) -> None:
        """Check the number."""
        if not is_count(self.run):
            raise RerouteError(f"FoldedAttention takes a number of tokens from 1 on, not run={shown(self.run)}.")

    def check(self, adapter: DecoderAdapter, layer: int) -> None:
        """See ``Ranker``: keys are to be made by one matrix."""
        adapter.key_weights(layer)

    def select(self, context: RankContext) -> Selection:
        """See ``Ranker``."""
        layer, rows, normed = context.decision.score_layer, context.rows, context.normed()
        project, spec = context.adapter.project, context.adapter.attention_spec(layer)
        weights = context.adapter.key_weights(layer)
        home = context.tables.cos.device
        cos, sin, last = (table.to(normed.device) for table in context.tables)
        candidates, text_rows = rows.candidates.to(normed.device), rows.text_rows.to(normed.device)
        scores = []
        for b, (start, length, n, m) in enumerate(zip(*rows.metadata.as_tuple()[:4], strict=True)):
            if not n:
                scores.append(cos.new_empty(0))
                continue
            texts, its, end = start + text_rows[b, :m], start + candidates[b, :n], last[b : b + 1]
            asked = torch.cat((texts, end))
            queries, keys = project(layer, normed[asked], RopeTables(cos[asked], sin[asked], torch.full_like(end, m)))
            query = rotate(queries, cos[end], sin[end], spec.rope)[0]
            keys = rotate(keys[:m], cos[texts], sin[texts], spec.rope).repeat_interleave(len(query) // keys.shape[1], 1)
            of_texts = torch.einsum("hd,mhd->hm", query.float(), keys.float())
            of_texts = of_texts.masked_fill(texts >= start + length, -torch.inf)  # behind the end of the prompt
            of_visual = self._logits(query, normed[its], RopeTables(cos[its], sin[its], end), spec.rope, *weights)
            attention = (torch.cat((of_visual, of_texts), 1) * spec.scale).softmax(1)
            scores.append(attention[:, :n].mean(0).to(home))
        return context.best(scores)

    def _logits(
        self,
        query: torch.Tensor,
        states: torch.Tensor,
        tables: RopeTables,
        rope: Rope,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """(H, n) fp32 of the rotated query (H, D) and the normed states (n, C) of candidates at ``tables``."""
        n, heads, groups = len(states), len(query), len(weight)
        share = self._in_runs(torch.ones_like(tables.cos[:, :1])).sum(1)
        cos, sin = (self._in_runs(table).sum(1) / share for table in tables[:2])
        back = rotate(query.expand(len(cos), -1, -1), cos, -sin, rope).unflatten(1, (groups, heads // groups))
        folded = torch.einsum("sgrd,gdc->sgrc", back, weight).flatten(1, 2)
        logits = torch.einsum("src,shc->hsr", self._in_runs(states).float(), folded.float())
        if bias is not None:
            logits = logits + torch.einsum("sgrd,gd->grs", back, bias).flatten(0, 1)[:, :, None]
        return logits.flatten(1)[:, :n]

    def _in_runs(self, rows: torch.Tensor) -> torch.Tensor:
        """(runs, run, w) of (n, w), with zeros behind the last one."""
        runs: torch.Tensor = pad(rows, (0, 0, 0, -len(rows) % self.run)).unflatten(0, (-1, self.run))
        return runs

    def flops(self, shape: ModelShape, rows: int, candidates: int, k: int) -> int:
        """One query row, keys of text, the folded query of each run, and the logits."""
        d, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        texts, runs = rows - candidates, -(-candidates // self.run)
        return 2 * d * q + texts * (2 * d * kv + 2 * q) + runs * 2 * d * q + candidates * 2 * d * shape.heads
