"""Decisions of a method that may not be made where the method has them are made at the next layer where they may."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from .schedule import Schedule
from .solver import scale_ratios

if TYPE_CHECKING:
    from ..rankers import Ranker

__all__ = ["moved"]


def moved(
    schedule: Schedule, num_layers: int, may_decide: Callable[[int, Ranker], bool], keep: float | None = None
) -> Schedule:
    """``schedule`` with each decision at the first layer from its own on before which ``may_decide`` lets it be made.

    They stay distinct and in order; those for which no layer is left fall away. With a budget ``keep`` = avg_T / N the
    ratios of a schedule that changed are scaled to it, else they stay. One that need not change comes out as it is, and
    so does one of which no decision finds a place.

    Raises:
        RerouteError: no ratios reach the budget ``keep`` from the layers that are left.
    """
    layers: list[int] = []
    scored = -1
    for layer, ranker in zip(schedule.layers, schedule.rankers, strict=True):
        after = max([layer, scored + 1 - ranker.layer_offset, *(last + 1 for last in layers[-1:])])
        place = next((later for later in range(after, num_layers) if may_decide(later, ranker)), None)
        if place is None:
            break
        layers.append(place)
        scored = place + ranker.layer_offset
    if not layers or tuple(layers) == schedule.layers:
        return schedule
    count = len(layers)
    ratios = schedule.ratios[:count]
    if keep is not None:
        ratios = scale_ratios(ratios, layers, num_layers, keep)
    return replace(
        schedule,
        layers=tuple(layers),
        ratios=ratios,
        rankers=schedule.rankers[:count],
        actions=schedule.actions[:count],
    )
