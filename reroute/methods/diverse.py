"""Diverse: a first cut that asks no question, before the decoder; then ranking by attention, several times."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from ..core.schedule import Action, PositionMode, Rounding, Schedule
from ..core.solver import scale_layers, scale_ratios
from ..rankers import Diversity, LastTokenAttention, Ranker
from ..rankers.base import check_ranker
from .base import Method

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Diverse"]


@dataclass(frozen=True)
class Diverse(Method):
    """The first decision keeps tokens that are unlike each other, later ones those that are attended to.

    - ``route``: before layers 0, 11 and 19 of 32, in the proportions 3 : 1 : 1.
    - ``remove``: before layers 0 and 14 of 32, in the proportions 27 : 8.

    Both suit the two small models of ``reroute.demo``, by whose answers to validation questions they were chosen
    (docs/design/explored.md). ``ratios`` has one per layer, relative to the N visual tokens; None is those whose budget
    avg_T / N is 1/3. ``first`` ranks the first decision, ``ranker`` the others.
    """

    name = "diverse"
    layers: ClassVar[dict[Action, tuple[int, ...]]] = {"route": (0, 11, 19), "remove": (0, 14)}
    proportions: ClassVar[dict[Action, tuple[float, ...]]] = {"route": (3, 1, 1), "remove": (27, 8)}
    usual_keep: ClassVar[float] = 1 / 3

    ratios: tuple[float, ...] | None = None
    rounding: Rounding = "floor"
    position_mode: PositionMode = field(default="preserved", kw_only=True)
    first: Ranker = field(default=Diversity(), kw_only=True)
    ranker: Ranker = field(default=LastTokenAttention(), kw_only=True)

    def __post_init__(self) -> None:
        """Check the rankers; a schedule checks the rest."""
        check_ranker(self.first)
        check_ranker(self.ranker)

    def schedule(self, num_layers: int, action: Action) -> Schedule:
        """See ``Method``."""
        if self.ratios is None:
            return self.with_budget(self.usual_keep, num_layers, action).schedule(num_layers, action)
        layers = scale_layers(self.layers[action], num_layers)
        rankers = (self.first, *[self.ranker] * (len(layers) - 1))
        return Schedule(layers, self.ratios, rankers, self.rounding, self.position_mode)

    def with_budget(self, keep: float, num_layers: int, action: Action) -> Self:
        """See ``Method``."""
        layers = scale_layers(self.layers[action], num_layers)
        return replace(self, ratios=scale_ratios(self.proportions[action][: len(layers)], layers, num_layers, keep))
