"""Decisions that may not be made where a method has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from reroute.config import RoutingConfig
from reroute.core.moving import moved
from reroute.core.schedule import Schedule
from reroute.core.solver import budget_of
from reroute.errors import RerouteError
from reroute.methods import METHODS, Diverse, FastV, PDrop
from reroute.rankers import LastTokenAttention, Ranker

EVERY_SIXTH = (5, 11, 17, 23, 29)
EARLIER = LastTokenAttention(layer_offset=-1)


def only(*layers: int) -> Callable[[int, Ranker], bool]:
    """A model that scores in these layers."""
    return lambda layer, ranker: layer + ranker.layer_offset in layers


def anywhere(layer: int, ranker: Ranker) -> bool:
    return True


def test_to_the_next_layer_that_may_decide() -> None:
    schedule = Schedule((2, 7, 15, 24), (0.5, 0.5, 0.25, 0.125))
    result = moved(schedule, 34, only(*EVERY_SIXTH))
    assert (result.layers, result.ratios) == ((5, 11, 17, 29), schedule.ratios)


def test_two_that_wait_for_the_same_layer() -> None:
    assert moved(Schedule((6, 7, 8), (0.5, 0.4, 0.3)), 34, only(*EVERY_SIXTH)).layers == (11, 17, 23)


def test_without_a_place() -> None:
    schedule = Schedule((20, 26, 28), (0.5, 0.4, 0.3), (EARLIER, LastTokenAttention(), EARLIER), actions=("route",) * 3)
    result = moved(schedule, 34, only(*EVERY_SIXTH))
    assert (result.layers, result.ratios) == ((24, 29), (0.5, 0.4))
    assert (result.rankers, result.actions) == (schedule.rankers[:2], ("route",) * 2)
    assert moved(schedule, 34, only(3)) is schedule, "refused by who asks, with the layers that there are"


def test_by_the_layer_that_scores() -> None:
    assert moved(Schedule((2, 7), (0.5, 0.4), (EARLIER,)), 34, only(*EVERY_SIXTH)).layers == (6, 12)


def test_scores_stay_in_order() -> None:
    """The second one decides a layer earlier than it routes, and may not come before or with the first."""
    schedule = Schedule((4, 6), (0.5, 0.4), (LastTokenAttention(), EARLIER))
    assert moved(schedule, 34, only(5, 11)).layers == (5, 12)


@pytest.mark.parametrize("action", ["route", "remove"])
@pytest.mark.parametrize("method", [PDrop(), FastV(), Diverse()], ids=lambda method: method.name)
def test_the_budget_holds(method: Any, action: Any) -> None:
    settings = RoutingConfig(method=method, action=action, keep=0.4).for_model(34).moved(34, only(*EVERY_SIXTH))
    schedule = settings.schedule
    assert set(schedule.layers) <= set(EVERY_SIXTH)
    assert budget_of(schedule.layers, schedule.ratios, 34) == pytest.approx(0.4, abs=1e-3)
    schedule.validate(34, action)


def test_a_budget_that_later_layers_cannot_meet() -> None:
    with pytest.raises(RerouteError, match="routing from layer 29 on"):
        RoutingConfig(keep=0.5).for_model(34).moved(34, only(29))


def test_what_need_not_move() -> None:
    """To the last bit, whatever the budget."""
    for name in METHODS.keys() - {"cdpruner"}:  # which wants more than a name
        for keep in (None, 0.4):
            config = RoutingConfig(method=name, keep=keep)
            assert config.for_model(32).moved(32, anywhere).schedule == config.schedule_for(32)


def test_schedules_of_the_caller_and_the_plain_model_stay() -> None:
    explicit = Schedule((2, 7), (0.5, 0.25))
    assert RoutingConfig(schedule=explicit).for_model(34).moved(34, only(*EVERY_SIXTH)).schedule is explicit

    def asked(layer: int, ranker: Ranker) -> bool:
        raise AssertionError("nothing is ranked")

    assert RoutingConfig(keep=1.0).for_model(34).moved(34, asked).keeps_all
