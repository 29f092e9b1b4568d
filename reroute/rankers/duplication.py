"""Tokens that least duplicate a few pivots: the ranking of DART."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import normalize

from reroute_kernels import Selection
from reroute_kernels.reference import rotate

from ..checks import shown, whole
from ..errors import RerouteError
from .base import DecoderAdapter, RankContext, Ranker

if TYPE_CHECKING:
    from ..core.cost import ModelShape

__all__ = ["Duplication", "picks_by_pivots", "shares_of_pivots"]


class _KeyNorms(NamedTuple):
    """L1 norms of the keys of a layer, for each sample.

    - ``visual[b]`` (N_b,), of the visual tokens ``indices[b]`` (N_b,) that were there.
    - ``question[b]`` (T_b,): of the text behind them.
    """

    visual: list[torch.Tensor]
    indices: list[torch.Tensor]
    question: list[torch.Tensor]


@dataclass(frozen=True)
class Duplication(Ranker):
    """Pivots are kept, and in turn for each of them those candidates that are least like it.

    Pivots are the candidates, and the tokens of the question, of largest keys: by the L1 norm over all heads in the
    layer before the decision, after RoPE from the first token of the prompt on. Candidates are compared by the cosine
    of what the decoder's last norm makes of their states. Besides the visual pivots, what is to be kept is shared among
    all pivots, of a remainder one each to the first. Visual pivots come first, those of the question after them, each
    the largest first.

    - ``visual``, ``text``: how many pivots, where there are as many: a question may be shorter.
    - ``seed``: draws pivots by chance instead, by the seed and the numbers of tokens alone.

    Without a seed it decides before layer 1 at the earliest, as there is a layer before that.
    """

    visual: int = 4
    text: int = 4
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        try:
            for name in ("visual", "text"):
                object.__setattr__(self, name, whole(getattr(self, name)))
            object.__setattr__(self, "seed", None if self.seed is None else whole(self.seed))
            is_right = min(self.visual, self.text) >= 0 and self.visual + self.text > 0
        except TypeError:
            is_right = False
        if not is_right:
            raise RerouteError(
                "Duplication takes numbers of pivots, one at least, and a seed or None, such as visual=4, text=4; got "
                f"visual={shown(self.visual)}, text={shown(self.text)}, seed={shown(self.seed)}."
            )

    def check(self, adapter: DecoderAdapter, layer: int) -> None:
        """See ``Ranker``: the decoder's last norm is called early."""
        adapter.check_final_norm()

    def looks_before(self, layer: int) -> Collection[int]:
        """See ``Ranker``."""
        return (layer - 1,) if self.seed is None else ()

    def note(self, context: RankContext) -> _KeyNorms:
        """See ``Ranker``."""
        adapter, layer, (cos, sin, _) = context.adapter, context.decision.score_layer, context.tables
        spec = adapter.attention_spec(layer)
        keys = adapter.project(layer, context.normed(), context.tables)[1].to(cos.device)
        keys = keys if spec.key_norm is None else spec.key_norm(keys)
        norms, counts = torch.zeros(len(keys), device=cos.device), context.rows.metadata
        for start, length in zip(counts.starts, counts.kv_lens, strict=True):
            own = slice(start, start + length)
            turned = rotate(keys[own], *_from_first(cos[own].float(), sin[own].float()), spec.rope)
            norms[own] = turned.float().abs().sum((1, 2))
        visual = context.candidates_of(norms)
        indices = [row[: len(its)] for row, its in zip(context.visual_indices, visual, strict=True)]
        return _KeyNorms(visual, indices, context.questions_of(norms))

    def select(self, context: RankContext) -> Selection:
        """See ``Ranker``."""
        states = context.adapter.final_norm(context.hidden()).to(context.tables.cos.device)
        scores = []
        for b, (hidden, question, k) in enumerate(
            zip(context.candidates_of(states), context.questions_of(states), context.decision.k, strict=True)
        ):
            visual, text = self._ranked(context, b, len(hidden), len(question))
            texts = question.index_select(0, text[: self.text])
            picks = picks_by_pivots(hidden, visual[: min(self.visual, k)], texts, k)
            scores.append(torch.zeros(len(hidden), device=hidden.device).index_fill(0, picks, 1))
        return context.best(scores)

    def flops(self, shape: ModelShape, rows: int, candidates: int, k: int) -> int:
        """The cosine of each candidate with each pivot."""
        return 2 * candidates * shape.hidden * (min(self.visual, k) + self.text)

    def note_flops(self, shape: ModelShape, rows: int, candidates: int) -> int:
        """The keys of all ``rows``."""
        return 2 * rows * shape.hidden * shape.kv_heads * shape.head_dim

    def _ranked(self, context: RankContext, b: int, *counts: int) -> list[torch.Tensor]:
        """The candidates (N_b,) of sample ``b`` and the tokens (T_b,) of its question, which are ``counts``: who is
        rather a pivot first."""
        if self.seed is None:
            visual, indices, question = context.notes[context.decision.layer - 1]
            there = torch.searchsorted(indices[b], context.visual_indices[b, : counts[0]].contiguous())
            norms = (visual[b].index_select(0, there), question[b])  # candidates may have become fewer since
            return [its.sort(descending=True, stable=True).indices for its in norms]
        # On the host, where a seed means the same for any device, and pinned, so that the copy does not wait.
        device, generator = context.tables.cos.device, torch.Generator().manual_seed(self.seed % (1 << 64))
        drawn = [torch.randperm(n, generator=generator, device="cpu", pin_memory=device.type == "cuda") for n in counts]
        return [its.to(device, non_blocking=True) for its in drawn]


def picks_by_pivots(hidden: torch.Tensor, visual: torch.Tensor, text: torch.Tensor, k: int) -> torch.Tensor:
    """The ``k`` tokens (k,) of ``hidden`` (N, C) that are kept: pivots first, then in the order of picking.

    Args:
        hidden: compared by their cosines, in fp32.
        visual: (P,) indices of pivots among them, P <= k.
        text: (Q, C) pivots that are none of them.
        k: at most N.
    """
    unit = normalize(hidden.float(), dim=-1)
    pivots = torch.cat([unit.index_select(0, visual), normalize(text.float(), dim=-1)])
    picks, taken = [visual], torch.zeros(len(unit), dtype=torch.bool, device=unit.device).index_fill(0, visual, True)
    for cosines, count in zip(pivots @ unit.T, shares_of_pivots(k - len(visual), len(pivots)), strict=True):
        least_alike = cosines.masked_fill(taken, torch.inf).sort(stable=True).indices[:count]
        taken = taken.index_fill(0, least_alike, True)
        picks.append(least_alike)
    return torch.cat(picks)


def _from_first(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of tables (n, rot): those of each position's distance from the first.

    The L1 norm of a key, unlike its product with a query, changes if all positions move, as padding makes them do.
    """
    return cos * cos[:1] + sin * sin[:1], sin * cos[:1] - cos * sin[:1]


def shares_of_pivots(count: int, pivots: int) -> list[int]:
    """How many of ``count`` picks each of the ``pivots`` makes."""
    each, first = divmod(count, pivots) if pivots else (0, 0)
    return [each + (i < first) for i in range(pivots)]
