"""Tokens that are relevant and unlike each other, by a determinant: the choice of CDPruner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn.functional import normalize

from reroute_kernels import Selection

from ..checks import items, shown
from ..errors import RerouteError
from .base import RankContext, Ranker
from .merging import projector_inputs
from .pictures import albums, keep
from .scores import RankInputs, ScoreRanker
from .vision import TowerShape

if TYPE_CHECKING:
    from ..core.cost import ModelShape

__all__ = ["ClipRelevance", "ConditionalDiversity", "determinant_picks", "normalised_relevance"]

SPANNED = 1e-5
"""A token of which less than this share is not spanned by the picks before it is taken to be spanned: in fp32 the rest
is rounding."""


@dataclass(frozen=True)
class ConditionalDiversity(Ranker):
    """The greedy choice of the largest determinant of cosines of embeddings, weighted by relevance (a DPP).

    The relevance of the tokens of a picture is scaled from 0 to 1. Where all tokens are spanned by the picks, the rest
    of the budget is filled by relevance (the authors' code goes on with what is rounding). Each picture is by itself.
    Picks are made one by one, in about ten small operations each.

    It decides before layer 0.

    - ``relevance``: what scores the tokens. The authors' is ``ClipRelevance``, which has to be given CLIP's embeddings
      of the question: the routed model can compute none, so without a relevance nothing is routed.
    """

    needs_attention: ClassVar[bool] = False
    needs_vision: ClassVar[bool] = True

    relevance: ScoreRanker | None = None

    def __post_init__(self) -> None:
        """Check the relevance."""
        if not isinstance(self.relevance, ScoreRanker | None):
            raise RerouteError(
                "relevance is a ScoreRanker, such as reroute.rankers.ClipRelevance(embed, texts), not "
                f"{type(self.relevance).__name__}."
            )

    def tower_states(self, tower: TowerShape) -> Sequence[int]:
        """See ``Ranker``.

        Raises:
            RerouteError: there is no relevance.
        """
        return self.given().tower_states(tower) if self.given().needs_vision else ()

    def select(self, context: RankContext) -> Selection:
        """See ``Ranker``.

        Raises:
            RerouteError: not the decision before layer 0.
        """
        of_samples, states = albums(self, context), context.hidden()
        relevances = self.given().scores_of(context, states)
        scores, chosen = [], []
        for hidden, relevance, album in zip(context.candidates_of(states), relevances, of_samples, strict=True):
            scaled = [normalised_relevance(relevance[image.tokens]) for image in album]
            scores.append(torch.cat(scaled) if scaled else relevance.float())
            chosen.append(
                [
                    torch.zeros(image.n, dtype=torch.bool, device=hidden.device).index_fill(
                        0, determinant_picks(hidden[image.tokens], its, image.k), True
                    )
                    for its, image in zip(scaled, album, strict=True)
                ]
            )
        return keep(context, chosen, scores)

    def flops(self, shape: ModelShape, rows: int, candidates: int, k: int) -> int:
        """The cosines of all candidates with each pick, what is projected out, and the relevance."""
        picking = 2 * candidates * k * shape.hidden + candidates * k * max(0, k - 1)
        return picking + (self.relevance.flops(shape, rows, candidates, k) if self.relevance is not None else 0)

    def given(self) -> ScoreRanker:
        """The relevance.

        Raises:
            RerouteError: there is none.
        """
        if self.relevance is None:
            raise RerouteError(
                "CDPruner ranks by the likeness of CLIP's embeddings of patches and question, and this model has no "
                "text tower to make them. Give CDPruner(first=ConditionalDiversity(relevance)) a relevance: "
                "ClipRelevance with embeddings that CLIP made, or another ScoreRanker."
            )
        return self.relevance


@dataclass(frozen=True, eq=False)
class ClipRelevance(ScoreRanker):
    """The less like the question by CLIP, the more relevant, as CDPruner's authors have it: minus the mean cosine.

    - ``embed``: what CLIP makes of the states (n, F) that the projector reads, (n, E). With its model ``clip``:
      ``lambda x: clip.visual_projection(clip.vision_model.post_layernorm(x))``.
    - ``texts``: CLIP's embeddings (chunks, E) of the question, one for each chunk of 77 tokens; a sequence of them has
      one for each sample of the call. What CLIP computes is not counted.

    The question changes from call to call, so ``handle.at(method=CDPruner(first=...))`` is the way to give it.
    """

    needs_vision: ClassVar[bool] = True

    embed: Callable[[torch.Tensor], torch.Tensor] = field(repr=False)
    texts: torch.Tensor | Sequence[torch.Tensor] = field(repr=False)

    def __post_init__(self) -> None:
        """Check the texts. RerouteError if they are no tensors."""
        try:
            texts = [self.texts] if isinstance(self.texts, torch.Tensor) else items(self.texts)
        except TypeError:
            texts = [None]
        if not all(isinstance(its, torch.Tensor) and its.ndim == 2 for its in texts):
            raise RerouteError(
                "ClipRelevance takes embeddings (chunks, E) of the question, or several for several samples, not "
                f"{shown(self.texts)}: clip.get_text_features(…).pooler_output."
            )

    def tower_states(self, tower: TowerShape) -> Sequence[int]:
        """See ``Ranker``."""
        return tower.features

    def scores(self, inputs: RankInputs) -> list[torch.Tensor]:
        """See ``ScoreRanker``.

        Raises:
            RerouteError: there are texts for another number of samples.
        """
        states = projector_inputs(inputs.vision)
        texts = [self.texts] * len(states) if isinstance(self.texts, torch.Tensor) else list(self.texts)
        if len(texts) != len(states):
            raise RerouteError(
                f"ClipRelevance has texts for {len(texts)} samples, and the call has {len(states)}. Give one tensor of "
                "embeddings for each, or one for all."
            )
        return [
            -_cosines(self.embed(its), text.to(its.device)).mean(1).index_select(0, index)
            for its, text, index in zip(states, texts, inputs.visual_indices, strict=True)
        ]


def normalised_relevance(scores: torch.Tensor) -> torch.Tensor:
    """``scores`` (n,) of a picture from 1e-6 above 0 to a little above 1, fp32; 1 where all of them are equal."""
    if not len(scores):
        return scores.float()
    low, high = scores.float().aminmax()
    return torch.where(high > low, (scores.float() - low + 1e-6) / (high - low), 1)


def determinant_picks(hidden: torch.Tensor, relevance: torch.Tensor, k: int) -> torch.Tensor:
    """Indices (k,) of picks among ``hidden`` (N, C), in their order; of equals the first. Waits for no device.

    Each pick makes the determinant of diag(r) L diag(r) over the picks as large as one can, with ``relevance`` r (N,)
    and the cosines L; where that would be 0 the most relevant one is next. This is an incremental Cholesky
    factorisation, whose rows are computed as they are needed.
    """
    unit, relevance = normalize(hidden.float(), dim=-1), relevance.float()
    whole = left = relevance.square()
    is_open = torch.ones_like(relevance, dtype=torch.bool)
    factor, picks = unit.new_zeros(k, len(unit)), []
    for step in range(k):
        gain = left.masked_fill(~is_open | (left <= SPANNED * whole), -torch.inf)
        is_spanned = gain.amax() == -torch.inf
        gain = torch.where(is_spanned, relevance.masked_fill(~is_open, -torch.inf), gain)
        picks.append(pick := gain.argmax(0, keepdim=True))
        is_open = is_open.index_fill(0, pick, False)
        row = relevance * relevance[pick] * (unit @ unit.index_select(0, pick)[0])
        row = (row - factor[:step, pick].T[0] @ factor[:step]) / left[pick].clamp(
            min=torch.finfo(left.dtype).tiny
        ).sqrt()
        factor[step] = row.masked_fill(is_spanned, 0)
        left = left - factor[step].square()
    return torch.cat(picks) if picks else torch.empty(0, dtype=torch.int64, device=hidden.device)


def _cosines(embeds: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    return normalize(embeds, dim=-1) @ normalize(texts, dim=-1).to(embeds.dtype).T
