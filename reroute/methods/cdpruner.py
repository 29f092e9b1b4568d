"""CDPruner: visual tokens that are relevant and unlike each other, chosen once before the decoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ..core.schedule import Action, Schedule
from ..rankers import ConditionalDiversity, Ranker
from .diverse import Diverse

__all__ = ["CDPruner"]


@dataclass(frozen=True)
class CDPruner(Diverse):
    """The largest determinant of likeness and relevance before layer 0 (``ConditionalDiversity``).

    - ``remove``: that decision alone, as published; a ninth is kept unless ``ratios`` or a budget says otherwise.
    - ``route``: later decisions by attention, as ``Diverse`` makes them.

    It has to be given a relevance: ``first=ConditionalDiversity(ClipRelevance(embed, texts))`` is the authors'.
    """

    name = "cdpruner"
    layers: ClassVar[dict[Action, tuple[int, ...]]] = {**Diverse.layers, "remove": (0,)}
    proportions: ClassVar[dict[Action, tuple[float, ...]]] = {**Diverse.proportions, "remove": (1,)}
    usual_keep: ClassVar[float] = 1 / 9

    first: Ranker = field(default=ConditionalDiversity(), kw_only=True)

    def schedule(self, num_layers: int, action: Action) -> Schedule:
        """See ``Method``.

        Raises:
            RerouteError: there is no relevance.
        """
        if isinstance(self.first, ConditionalDiversity):
            self.first.given()
        return super().schedule(num_layers, action)
