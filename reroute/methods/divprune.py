"""DivPrune: visual tokens that are far from each other, chosen once before the decoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ..core.schedule import Action, Rounding
from ..rankers import MaxMinDistance, Ranker
from .diverse import Diverse

__all__ = ["DivPrune"]


@dataclass(frozen=True)
class DivPrune(Diverse):
    """Max-min distance before layer 0.

    - ``remove``: that decision alone, as published; 9.8 % are kept unless ``ratios`` or a budget says otherwise.
    - ``route``: later decisions by attention, as ``Diverse`` makes them.
    """

    name = "divprune"
    layers: ClassVar[dict[Action, tuple[int, ...]]] = {**Diverse.layers, "remove": (0,)}
    proportions: ClassVar[dict[Action, tuple[float, ...]]] = {**Diverse.proportions, "remove": (1,)}
    usual_keep: ClassVar[float] = 0.098

    rounding: Rounding = "half_even"
    first: Ranker = field(default=MaxMinDistance(), kw_only=True)
