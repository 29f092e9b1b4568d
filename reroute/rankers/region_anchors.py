"""Anchors spread over the picture, which take up what is near and alike: the first stage of Nüwa."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch.nn.functional import normalize

from reroute_kernels import Selection

from ..checks import check_name, is_count, shown
from ..errors import RerouteError
from .base import Merge, RankContext, Ranker
from .merging import WEIGHTS, projector_inputs
from .pictures import Picture, albums, best_of_regions, keep
from .vision import Grid, TowerShape, Vision

if TYPE_CHECKING:
    from ..core.cost import ModelShape

__all__ = ["RegionAnchors", "aggregate", "are_anchors", "collecting_weights", "quantile"]

Convention = Literal["code", "paper"]


class _Rules(NamedTuple):
    """What differs between the conventions.

    - ``reach``: of an anchor, as a share of the largest distance in a picture.
    - ``quantile``: anchors that stand out from it are pillars, which stay as they are.
    - ``keeps_self``: whether an anchor stays whole while it takes up others; else the weights sum to 1.
    """

    reach: float
    quantile: float
    keeps_self: bool


CLS, MERGED, PAPER = _Rules((280 / 1058) ** 0.5, 0.55, True), _Rules(0.8, 0.1, False), _Rules(0.26, 0.75, False)
"""The released code for LLaVA-1.5 (a reach of the root of 280 patches on 24 x 24), for Qwen2.5-VL, and the paper."""


@dataclass(frozen=True)
class RegionAnchors(Ranker):
    """Of each 2 x 2 region of a picture the tokens that its tower attends to most, and of these the most attended.

    Each of them takes up the tokens around it, by the cosine of what the tower made of them and the less the farther,
    but for pillars, which stand out so much that they stay as they are. LLaVA-1.5 aggregates what the projector reads,
    Qwen2.5-VL what it makes. A prompt's budget is shared among its pictures by their size; each is by itself.

    It decides before layer 0.

    - ``per_region``: how many of a region may be kept. None: as few as suffice.
    - ``convention``: ``"code"`` as released for either model, or ``"paper"``: attention times the norm of the key, the
      largest quarter of key norms as pillars, a reach of 26 % of the largest distance, weights that sum to 1.
    - ``by_rows``: whether a token of Qwen2.5-VL is compared by its own similarity features; the released code takes
      those that the tower's windows have put in its place.
    """

    needs_attention: ClassVar[bool] = False
    needs_vision: ClassVar[bool] = True

    per_region: int | None = None
    convention: Convention = "code"
    by_rows: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        check_name("convention", self.convention, get_args(Convention))
        if self.per_region is not None and not (is_count(self.per_region) and self.per_region <= 4):
            raise RerouteError(f"per_region is a number from 1 to 4, or None, not {shown(self.per_region)}.")
        if not isinstance(self.by_rows, bool):
            raise RerouteError(f"by_rows is True or False, not {shown(self.by_rows)}.")

    def tower_states(self, tower: TowerShape) -> Sequence[int]:
        """See ``Ranker``."""
        features = tower.features if tower.has_cls else ()
        return [tower.scored_layer, *_similarity_states(tower), *features]

    def decide(self, context: RankContext) -> tuple[Selection, Merge]:
        """See ``Ranker``.

        Raises:
            RerouteError: not the decision before layer 0.
        """
        of_samples = albums(self, context)
        salience, prominence = self._salience(context.vision)
        chosen = [
            [are_anchors(its[image.tokens], image.grid, image.k, self.per_region) for image in album]
            for its, album in zip(salience, of_samples, strict=True)
        ]
        selection = keep(context, chosen, salience)
        return selection, self._merge(context, context.vision, selection, prominence, of_samples)

    def select(self, context: RankContext) -> Selection:
        """See ``Ranker``."""
        return self.decide(context)[0]

    def flops(self, shape: ModelShape, rows: int, candidates: int, k: int) -> int:
        """Attention in the tower, similarities, what is taken up, and projections; as if of one picture."""
        tower = shape.tower
        if tower is None:
            return 0
        compared, taken, projected = shape.hidden, shape.hidden, candidates
        if tower.has_cls:
            compared, taken, projected = tower.hidden, tower.hidden * len(tower.features), k
        collecting = 2 * k * candidates * (compared + taken) + 2 * projected * tower.projector
        return tower.attention_flops(candidates) + collecting

    def _salience(self, vision: Vision) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Of each sample's tokens (N_b,): what anchors are ranked by, and what makes pillars of them."""
        layer = vision.shape.scored_layer
        salience = [attention.sum(0) for attention in vision.attention(layer)]
        if self.convention == "code":
            return salience, salience
        norms = [keys.flatten(1).norm(dim=-1) for keys in vision.keys(layer)]
        return [a * b for a, b in zip(salience, norms, strict=True)], norms

    def _merge(
        self,
        context: RankContext,
        vision: Vision,
        selection: Selection,
        prominence: list[torch.Tensor],
        of_samples: list[list[Picture]],
    ) -> Merge:
        tower, rules = vision.shape, self._rules(vision.shape)

        def merge(hidden: torch.Tensor) -> torch.Tensor:
            merged = hidden.new_zeros(*selection.kept.shape, hidden.shape[-1])
            # Read here, where gradients pass.
            states = [vision.states(i, as_run=not self.by_rows) for i in _similarity_states(tower)]
            similar = [torch.stack(its).mean(0) for its in zip(*states, strict=True)]
            sources = context.candidates_of(hidden)
            if tower.has_cls:
                sources = projector_inputs(vision)
            for b, (source, album) in enumerate(zip(sources, of_samples, strict=True)):
                compared = similar[b] if tower.has_cls or not len(source) else vision.project(similar[b])
                taken = []
                for image in album:
                    anchors = selection.kept[b, image.kept] - image.tokens.start
                    pillars = _pillars(prominence[b][image.tokens].index_select(0, anchors), rules.quantile)
                    reach = rules.reach * hypot(*_last_cell(image.grid, tower)) or 1.0  # of a picture of one token
                    its = (source[image.tokens], compared[image.tokens], anchors, pillars)
                    taken.append(aggregate(*its, image.grid, reach, rules.keeps_self))
                if taken:
                    own = torch.cat(taken)
                    merged[b, : len(own)] = vision.project(own) if tower.has_cls else own
            return merged

        return merge

    def _rules(self, tower: TowerShape) -> _Rules:
        if self.convention == "paper":
            return PAPER
        return CLS if tower.has_cls else MERGED


def are_anchors(salience: torch.Tensor, grid: Grid, k: int, per_region: int | None = None) -> torch.Tensor:
    """Which of the tokens of a picture with this ``salience`` (N,) are its ``k`` anchors, (N,) bool.

    Candidates are the ``per_region`` most salient of each region of 2 x 2; at the border regions have fewer tokens. The
    most salient candidates become anchors, and others only where there are too few of them. Of equals the first.
    """
    places, across = torch.arange(len(salience), device=salience.device), -(-grid[1] // 2)
    regions = places // grid[1] // 2 * across + places % grid[1] // 2
    per_region = -(-k // (-(-grid[0] // 2) * across)) if per_region is None else per_region
    return best_of_regions(salience, regions, k, per_region)


def quantile(values: torch.Tensor, q: float) -> torch.Tensor:
    """The quantile ``q`` of ``values`` (n,) in fp32, with linear interpolation at an fp32 rank; waits for no device."""
    ordered = values.float().sort().values
    rank = np.float32(q) * np.float32(len(ordered) - 1)
    below = int(rank)
    above = min(below + 1, len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], float(rank - np.float32(below)))


def aggregate(
    source: torch.Tensor,
    similar: torch.Tensor,
    anchors: torch.Tensor,
    pillars: torch.Tensor,
    grid: Grid,
    reach: float,
    keeps_self: bool,
) -> torch.Tensor:
    """What the ``anchors`` (K,) of a picture make of ``source`` (N, F): (K, F). See ``collecting_weights``."""
    parts = [
        collecting_weights(similar, some, of_them, grid, reach, keeps_self).to(source.dtype) @ source
        for some, of_them in zip(
            *(x.split(max(1, WEIGHTS // max(1, len(source)))) for x in (anchors, pillars)), strict=True
        )
    ]
    return torch.cat(parts)


def collecting_weights(
    similar: torch.Tensor, anchors: torch.Tensor, pillars: torch.Tensor, grid: Grid, reach: float, keeps_self: bool
) -> torch.Tensor:
    """How much each anchor takes of each token of its picture, (K, N) fp32.

    Args:
        similar: (N, F); cosines are taken in its dtype, and those below 0 are 0.
        anchors: (K,) int64 numbers of tokens, row by row.
        pillars: (K,) bool, those that take nothing.
        grid: rows and columns of the N tokens.
        reach: distance, in tokens, from which on nothing is taken.
        keeps_self: whether each anchor's own weight is 1 after the weights were made to sum to 1.
    """
    unit = normalize(similar, dim=-1)
    cosines = unit.index_select(0, anchors) @ unit.T
    places = torch.arange(len(similar), device=similar.device)
    row, column = places // grid[1], places % grid[1]
    apart = torch.stack([x.index_select(0, anchors)[:, None] - x for x in (row, column)]).float()
    nearness = 1 - (apart.square().sum(0).sqrt() / reach).clamp(max=1)
    is_self = anchors[:, None] == places
    weights = (cosines.clamp(min=0).float() * nearness).masked_fill(pillars[:, None] & ~is_self, 0)
    weights = weights / (weights.sum(1, keepdim=True) + 1e-8)
    return weights.masked_fill(is_self, 1) if keeps_self else weights


def _pillars(prominence: torch.Tensor, q: float) -> torch.Tensor:
    """Which of the anchors with this ``prominence`` (K,) reach its quantile ``q``."""
    if not len(prominence):
        return prominence > 0
    return prominence.float() >= quantile(prominence, q)


def _last_cell(grid: Grid, tower: TowerShape) -> Grid:
    """The place of the last cell of a picture's regions; without CLS they are padded, as in the released code."""
    rows, columns = grid if tower.has_cls else (grid[0] + grid[0] % 2, grid[1] + grid[1] % 2)
    return rows - 1, columns - 1


def _similarity_states(tower: TowerShape) -> range:
    """The hidden states whose mean is compared: 16 to 24 of 24 layers with CLS, 8 to 24 of 32 without."""
    layers = tower.num_layers
    return range(layers * 2 // 3, layers + 1) if tower.has_cls else range(layers // 4, layers * 3 // 4 + 1)
