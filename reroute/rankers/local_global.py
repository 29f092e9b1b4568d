"""Tokens that an early layer of the vision tower attends to in each window, and a late one anywhere: VScan's choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from reroute_kernels import Selection

from .base import Merge, RankContext, Ranker
from .merging import absorb, nearest
from .pictures import Picture, albums, best_of_regions, best_tokens, keep
from .vision import Grid, TowerShape

if TYPE_CHECKING:
    from ..core.cost import ModelShape

__all__ = ["LocalGlobal", "best_local", "take_up_all"]

WINDOWS_OF_CLS, WINDOWS_OF_MERGED = 6, 4
"""Sides of a window in tokens: LLaVA-1.5 has 6 x 6 patches, Qwen2.5-VL 4 x 4 merged ones."""


@dataclass(frozen=True)
class LocalGlobal(Ranker):
    """Half of the tokens by the attention in an early layer, window by window, the others by that of a late one.

    The late layer is the one that makes the features, the early one number 5 of 24 with CLS, else the first with full
    attention; attention is the mean over heads. With CLS (LLaVA-1.5) each window of 6 x 6 has an equal number of local
    tokens, without it (Qwen2.5-VL) each of 4 x 4 at most its share, rounded up; tokens beyond the last whole window
    belong to it. Then each token that is not kept is taken up by the one whose embedding is most like its own, and each
    of those goes on with the mean. Each picture is by itself.

    It decides before layer 0.
    """

    needs_attention: ClassVar[bool] = False
    needs_vision: ClassVar[bool] = True

    def tower_states(self, tower: TowerShape) -> Sequence[int]:
        """See ``Ranker``."""
        return [_local_layer(tower), tower.scored_layer]

    def decide(self, context: RankContext) -> tuple[Selection, Merge]:
        """See ``Ranker``.

        Raises:
            RerouteError: not the decision before layer 0.
        """
        of_samples = albums(self, context)
        tower = context.vision.shape
        local, late = (
            [attention.mean(0) for attention in context.vision.attention(layer)]
            for layer in (_local_layer(tower), tower.scored_layer)
        )
        chosen = [
            [_best(near[its.tokens], far[its.tokens], its, evenly=tower.has_cls) for its in album]
            for near, far, album in zip(local, late, of_samples, strict=True)
        ]
        selection = keep(context, chosen, late)

        def merge(hidden: torch.Tensor) -> torch.Tensor:
            merged = hidden.new_zeros(*selection.kept.shape, hidden.shape[-1])
            for b, (states, album) in enumerate(zip(context.candidates_of(hidden), of_samples, strict=True)):
                for image in album:
                    kept = selection.kept[b, image.kept] - image.tokens.start
                    merged[b, image.kept] = take_up_all(states[image.tokens], kept)
            return merged

        return selection, merge

    def select(self, context: RankContext) -> Selection:
        """See ``Ranker``."""
        return self.decide(context)[0]

    def flops(self, shape: ModelShape, rows: int, candidates: int, k: int) -> int:
        """Attention in two layers of the tower, similarities, and what is taken up; as if of one picture."""
        if shape.tower is None:
            return 0
        merging = 4 * k * candidates * shape.hidden if k < candidates else 0
        return 2 * shape.tower.attention_flops(candidates) + merging


def best_local(salience: torch.Tensor, grid: Grid, k: int, side: int, *, evenly: bool) -> torch.Tensor:
    """Which tokens of a picture with this ``salience`` (N,) are its local ones, (N,) bool.

    Args:
        salience: attention in the early layer.
        grid: rows and columns of the tokens.
        k: how many there may be.
        side: of a window.
        evenly: as many of each window, and ``k`` at most; else the best ``k``, no more of a window than its share.
    """
    down, across = (max(1, length // side) for length in grid)
    places = torch.arange(len(salience), device=salience.device)
    row, column = (places // grid[1] // side).clamp(max=down - 1), (places % grid[1] // side).clamp(max=across - 1)
    windows = down * across
    per_window = k // windows if evenly else -(-k // windows)
    count = per_window * windows if evenly else k
    return best_of_regions(salience, row * across + column, count, per_window)


def take_up_all(states: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """What the ``kept`` tokens (K,) make of the ``states`` (N, C) of a picture, means of those like each: (K, C)."""
    if len(kept) in (0, len(states)):
        return states.index_select(0, kept)
    takes = nearest(states.detach(), kept).index_fill(0, kept, -1)
    return absorb(states, kept, takes, averages=True)


def _best(local: torch.Tensor, late: torch.Tensor, image: Picture, *, evenly: bool) -> torch.Tensor:
    """Which of a picture's tokens are kept, (N,) bool."""
    side = WINDOWS_OF_CLS if evenly else WINDOWS_OF_MERGED
    is_local = best_local(local, image.grid, image.k // 2, side, evenly=evenly)
    return best_tokens(late.float().masked_fill(is_local, torch.inf), image.k)


def _local_layer(tower: TowerShape) -> int:
    """The early layer."""
    if tower.has_cls:
        return tower.num_layers * 5 // 24
    return next(iter(tower.full_attention), tower.scored_layer)
