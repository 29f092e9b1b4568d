"""Tokens that the vision tower attends to, and a few that stand for the rest: the choice of VisionZip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch

from reroute_kernels import Selection

from ..checks import number, shown
from ..errors import RerouteError
from .base import Merge, RankContext, Ranker
from .merging import absorb, nearest, projector_inputs
from .pictures import Picture, albums, best_tokens, keep
from .vision import TowerShape, Vision

if TYPE_CHECKING:
    from ..core.cost import ModelShape

__all__ = ["Choice", "DominantContextual", "choose"]


class Choice(NamedTuple):
    """Of the N tokens of a picture: the places of the ``dominant`` (D,) and ``contextual`` ones (C,), ascending, and
    which of the contextual ones takes up each token, (N,) int64, -1 for none.
    """

    dominant: torch.Tensor
    contextual: torch.Tensor
    takes: torch.Tensor


@dataclass(frozen=True)
class DominantContextual(Ranker):
    """The tokens to which CLS attends most, and of the others every so many-th, which takes up the rest.

    Attention is that of the layer that makes the features, summed over heads. Each token that is not kept goes to the
    contextual token whose keys are most like its own, mean over heads; the mean of them is added to the contextual
    one's features, before the projector. Each picture is by itself, and one that keeps all its tokens stays as it is.

    It decides before layer 0, and needs a tower with a CLS row.

    - ``contextual``: share of contextual tokens among those that are kept, rounded to the nearest number.
    - ``as_released``: CLS is a visual token too and counts as the first of the dominant ones, and the contextual ones
      come last. For it a picture keeps the place of its next most attended patch. Without it each token stays in its
      own place, as ``route`` needs it.
    """

    needs_attention: ClassVar[bool] = False
    needs_vision: ClassVar[bool] = True

    contextual: float = 10 / 64
    as_released: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        try:
            contextual = number(self.contextual)
        except (TypeError, ValueError, OverflowError):
            contextual = 1.0
        if not 0 <= contextual < 1 or not isinstance(self.as_released, bool):
            raise RerouteError(
                "DominantContextual takes a share of contextual tokens below 1, and whether it does as_released, not "
                f"contextual={shown(self.contextual)}, as_released={shown(self.as_released)}."
            )
        object.__setattr__(self, "contextual", contextual)

    def tower_states(self, tower: TowerShape) -> Sequence[int]:
        """See ``Ranker``.

        Raises:
            RerouteError: the tower has no CLS row.
        """
        if not tower.has_cls:
            raise RerouteError(
                "DominantContextual (VisionZip) ranks by what CLS attends to, and this vision tower has no CLS row. "
                "Choose another ranker or method."
            )
        return [tower.scored_layer, *tower.features]

    def decide(self, context: RankContext) -> tuple[Selection, Merge]:
        """See ``Ranker``.

        Raises:
            RerouteError: not the decision before layer 0.
        """
        of_samples = albums(self, context)
        layer = context.vision.shape.scored_layer
        salience = [attention.sum(0) for attention in context.vision.attention(layer)]
        keys = [its.mean(1) for its in context.vision.keys(layer)]
        choices = [
            [self._choose(attended[its.tokens], compared[its.tokens], its.k) for its in album]
            for attended, compared, album in zip(salience, keys, of_samples, strict=True)
        ]
        chosen = [
            [self._places(choice, its[image.tokens], image.k) for image, choice in zip(album, of_album, strict=True)]
            for its, album, of_album in zip(salience, of_samples, choices, strict=True)
        ]
        selection = keep(context, chosen, salience)
        return selection, self._merge(context, context.vision, selection, of_samples, choices)

    def select(self, context: RankContext) -> Selection:
        """See ``Ranker``."""
        return self.decide(context)[0]

    def flops(self, shape: ModelShape, rows: int, candidates: int, k: int) -> int:
        """Attention and keys in the tower, similarities, what is taken up, and projections; as if of one picture."""
        tower = shape.tower
        if tower is None:
            return 0
        looking = tower.attention_flops(candidates) + 2 * candidates * tower.hidden * tower.hidden
        if not 0 < k < candidates:
            return looking
        c = self._counts(k)[1]
        compared, taken = tower.hidden // tower.heads, tower.hidden * len(tower.features)
        return looking + 2 * c * candidates * (compared + taken) + 2 * (c + self.as_released) * tower.projector

    def _counts(self, k: int) -> tuple[int, int]:
        """How many patches are dominant, and how many tokens contextual, of ``k`` that are at least one."""
        contextual = min(round(k * self.contextual), k - self.as_released)
        return k - contextual - self.as_released, contextual

    def _choose(self, salience: torch.Tensor, keys: torch.Tensor, k: int) -> Choice | None:
        """What a picture keeps; None if all of its tokens, or none."""
        return choose(salience, keys, *self._counts(k)) if 0 < k < len(salience) else None

    def _places(self, choice: Choice | None, salience: torch.Tensor, k: int) -> torch.Tensor:
        """The ``k`` places that a picture keeps, (N,) bool."""
        if choice is not None:
            salience = salience.float().index_fill(0, torch.cat(choice[:2]), torch.inf)
        return best_tokens(salience, k)

    def _merge(
        self,
        context: RankContext,
        vision: Vision,
        selection: Selection,
        of_samples: list[list[Picture]],
        choices: list[list[Choice | None]],
    ) -> Merge:
        def merge(hidden: torch.Tensor) -> torch.Tensor:
            merged = hidden.new_zeros(*selection.kept.shape, hidden.shape[-1])
            # Read here, where gradients pass.
            features, states = projector_inputs(vision), context.candidates_of(hidden)
            cls = [torch.cat(its, -1) for its in zip(*map(vision.cls, vision.shape.features), strict=True)]
            for b, (album, of_album) in enumerate(zip(of_samples, choices, strict=True)):
                for i, (image, choice) in enumerate(zip(album, of_album, strict=True)):
                    kept = selection.kept[b, image.kept] - image.tokens.start
                    its = states[b][image.tokens]
                    if choice is None:
                        merged[b, image.kept] = its.index_select(0, kept)
                        continue
                    made = absorb(features[b][image.tokens], choice.contextual, choice.takes)
                    made = vision.project(torch.cat([cls[b][i : i + 1], made]) if self.as_released else made)
                    merged[b, image.kept] = self._ordered(its, kept, choice, made.to(its.dtype))
            return merged

        return merge

    def _ordered(self, states: torch.Tensor, kept: torch.Tensor, choice: Choice, made: torch.Tensor) -> torch.Tensor:
        """A picture's kept tokens (k, C), of its ``states`` (N, C) and those ``made``: contextual ones, maybe CLS."""
        if self.as_released:
            return torch.cat([made[:1], states.index_select(0, choice.dominant), made[1:]])
        at = torch.searchsorted(kept, choice.contextual.contiguous())
        return states.index_select(0, kept).index_copy(0, at, made)


def choose(salience: torch.Tensor, keys: torch.Tensor, dominant: int, contextual: int) -> Choice:
    """The ``dominant`` tokens of highest ``salience`` (N,) of a picture, and ``contextual`` ones among the others.

    Those are evenly spaced, from the first on. ``keys`` (N, D) say which is most like each token that is not kept.
    """
    is_dominant = best_tokens(salience, dominant)
    order = is_dominant.int().sort(stable=True).indices
    rest, first = order.split([len(order) - dominant, dominant])
    step = max(1, len(rest) // max(1, contextual))
    places = rest[: step * contextual : step]
    takes = torch.full_like(order, -1)
    if contextual:
        likest = nearest(keys, places)
        takes = takes.index_copy(0, rest, likest.index_select(0, rest)).index_fill(0, places, -1)
    return Choice(first, places, takes)
