from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reroute.core.schedule import Action, Rounding, Schedule, count
from reroute.errors import RerouteError, UnsupportedCacheError, UnsupportedModelError, unknown
from reroute.rankers import LastTokenAttention, RandomScores

ratios = st.floats(min_value=1e-6, max_value=1.0)
ROUNDINGS: tuple[Rounding, ...] = ("floor", "floor0", "half_even")
roundings = st.sampled_from(ROUNDINGS)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    layers = sorted(draw(st.sets(st.integers(1, 30), min_size=1, max_size=6)))
    keep = draw(st.lists(ratios, min_size=len(layers), max_size=len(layers)))
    rankers = draw(st.sampled_from([(LastTokenAttention(),), (LastTokenAttention(-1),), (RandomScores(3),)]))
    actions: tuple[Action, ...] = draw(st.sampled_from([(), ("remove", *["route"] * (len(layers) - 1))]))
    return Schedule(tuple(layers), tuple(keep), rankers, draw(roundings), actions=actions)


@pytest.mark.parametrize(
    ("n", "ratio", "kept"),
    [
        (576, 0.2644, 152),
        (576, 0.1418, 81),
        (576, 0.01916, 11),
        (576, 0.4502, 259),
        (576, 0.2251, 129),
        (576, 0.1126, 64),
        (576, 0.5965, 343),
        (576, 0.3558, 204),
        (576, 0.0106, 6),
        (437, 0.2644, 115),
        (437, 0.01916, 8),
        (8, 0.25, 2),
        (10, 0.05, 1),
        (100, 0.29, 28),  # 100 * 0.29 is just below 29 in binary
        (0, 0.5, 0),
        (1, 0.001, 1),
        (1, 1.0, 1),
    ],
)
def test_floor_keeps_at_least_one(n: int, ratio: float, kept: int) -> None:
    assert count(n, ratio) == kept


@pytest.mark.parametrize(
    ("n", "ratio", "rounding", "kept"),
    [
        (10, 0.05, "floor0", 0),
        (576, 0.125, "floor0", 72),
        (10, 0.25, "half_even", 2),
        (6, 0.75, "half_even", 4),
        (576, 0.25, "half_even", 144),
        (0, 1.0, "half_even", 0),
    ],
)
def test_other_roundings(n: int, ratio: float, rounding: Rounding, kept: int) -> None:
    assert count(n, ratio, rounding) == kept


@given(st.integers(0, 5000), ratios, ratios, roundings)
def test_count_is_bounded_and_monotone(n: int, a: float, b: float, rounding: Rounding) -> None:
    low, high = count(n, min(a, b), rounding), count(n, max(a, b), rounding)
    assert 0 <= low <= high <= n
    assert count(n, 1.0, rounding) == n


def test_counts_per_stage_and_layer() -> None:
    schedule = Schedule((2, 4, 6), (0.5, 0.5, 0.25))
    assert schedule.counts(8) == (4, 4, 2)
    assert schedule.per_layer(8, 8) == [8, 8, 4, 4, 4, 4, 2, 2]
    assert [schedule.stage_of(layer) for layer in range(8)] == [-1, -1, 0, 0, 1, 1, 2, 2]
    assert Schedule((2, 5, 8), (0.5, 0.4, 0.3)).counts(16) == (8, 6, 4)


@given(schedules(), st.integers(0, 3000))
def test_per_layer_is_every_stage_times_its_width(schedule: Schedule, n: int) -> None:
    widths = [end - start for start, end in pairwise((*schedule.layers, 32))]
    stages = sum(w * k for w, k in zip(widths, schedule.counts(n), strict=True))
    assert sum(schedule.per_layer(n, 32)) == schedule.layers[0] * n + stages


@given(schedules())
def test_json_round_trip(schedule: Schedule) -> None:
    assert Schedule.from_json(schedule.to_json()) == schedule


@pytest.mark.parametrize(
    ("layers", "ratios"),
    [
        ([2, 7], [1, 0.5]),
        (np.array([2, 7]), np.array([1, 0.5])),
        (torch.tensor([2, 7]), torch.tensor([1, 0.5])),
        (range(2, 8, 5), (Fraction(1), Fraction(1, 2))),
        (iter([2, 7]), (share for share in (1, 0.5))),
    ],
)
def test_other_sequences_become_tuples(layers: Any, ratios: Any) -> None:
    offset: Any = np.int64(-1)
    rankers: Any = [LastTokenAttention(offset), RandomScores()]
    schedule = Schedule(layers, ratios, rankers)
    assert schedule == Schedule((2, 7), (1.0, 0.5), (LastTokenAttention(-1), RandomScores()))
    assert hash(schedule) == hash(Schedule((2, 7), (1.0, 0.5), (LastTokenAttention(-1), RandomScores())))
    assert Schedule.from_json(schedule.to_json()) == schedule


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": 3, "ratios": 0.5}, r"sequence of layer numbers .* got layers=3, ratios=0.5"),
        ({"layers": (2.5,), "ratios": (0.5,)}, r"sequence of layer numbers"),
        ({"layers": (2,), "ratios": ("half",)}, r"sequence of ratios"),
        ({"layers": "2", "ratios": (0.5,)}, r"sequence of layer numbers .* got layers='2'"),
        ({"layers": (2,), "ratios": "1"}, r"sequence of ratios.* ratios='1'"),
        ({"layers": ("2",), "ratios": (0.5,)}, r"sequence of layer numbers"),
        ({"layers": (2,), "ratios": ("0.5",)}, r"sequence of ratios"),
        ({"layers": (True,), "ratios": (0.5,)}, r"sequence of layer numbers"),
        ({"layers": (2,), "ratios": (True,)}, r"sequence of ratios"),
        ({"layers": {2: 0.5, 4: 0.25}, "ratios": (0.5, 0.25)}, r"sequence of layer numbers"),
        ({"layers": (2, 4), "ratios": {0.5, 0.25}}, r"sequence of ratios"),
        ({"layers": (2,), "ratios": (10**400,)}, r"sequence of ratios"),
        ({"layers": (2,), "ratios": (0.5j,)}, r"sequence of ratios"),
        ({"layers": None, "ratios": (0.5,)}, r"sequence of layer numbers"),
        ({"layers": (), "ratios": ()}, r"at least one routing layer; to run the plain model, disable"),
        ({"layers": (2, 7), "ratios": (0.5,)}, r"one ratio per routing layer: got ratios \(0.5,\)"),
        ({"layers": (7, 2), "ratios": (0.5, 0.5)}, r"strictly increasing, not \(7, 2\)"),
        ({"layers": (2, 2), "ratios": (0.5, 0.5)}, r"strictly increasing"),
        ({"layers": (-1,), "ratios": (0.5,)}, r"must be 0 or more and strictly increasing, not \(-1,\)"),
        ({"layers": (0,), "ratios": (0.5,), "rankers": LastTokenAttention(-1)}, r"from layer 0 on; .* layers \(-1,\)"),
        (
            {"layers": (2, 3), "ratios": (0.5, 0.5), "rankers": (LastTokenAttention(), LastTokenAttention(-1))},
            r"one after the other, .* layers \(2, 3\) would be made before the layers \(2, 2\)",
        ),
        ({"layers": (2,), "ratios": (-0.1,)}, r"from 0 to 1, not \(-0.1,\)"),
        ({"layers": (2,), "ratios": (1.01,)}, r"from 0 to 1"),
        ({"layers": (2,), "ratios": (float("nan"),)}, r"from 0 to 1"),
        (
            {"layers": (2,), "ratios": (0.5,), "rankers": "random_scores"},
            r"must be a Ranker such as .* not 'random_scores'",
        ),
        ({"layers": (2,), "ratios": (0.5,), "rankers": LastTokenAttention}, r"must be a Ranker such as .* not <class"),
        ({"layers": (2,), "ratios": (0.5,), "rankers": ()}, r"one ranker, or one per routing layer: got 0 for 1"),
        ({"layers": (2, 3, 4), "ratios": (1, 1, 1), "rankers": (RandomScores(),) * 2}, r"got 2 for 3 layers"),
        ({"layers": (2,), "ratios": (0.5,), "rounding": None}, r"Unknown rounding None; known: floor"),
        ({"layers": (2,), "ratios": (0.5,), "rounding": ["floor"]}, r"Unknown rounding \['floor'\]; known: floor"),
        ({"layers": (2,), "ratios": (0.5,), "position_mode": np.array(["preserved"])}, r"Unknown position mode"),
        (
            {"layers": (2,), "ratios": (0.5,), "rounding": "flor"},
            r"Unknown rounding 'flor'; known: floor, floor0, half_even, nested, nested_floor\. Did you mean 'floor'\?",
        ),
        ({"layers": (2,), "ratios": (0.5,), "actions": ("drop",)}, r"Unknown action 'drop'; known: remove, route"),
        ({"layers": (2,), "ratios": (0.5,), "actions": "route"}, r"one action per routing layer.* got 'route' for 1"),
        ({"layers": (2, 3), "ratios": (1, 1), "actions": ("route",)}, r"one action per routing layer.* for 2 of them"),
        (
            {"layers": (2,), "ratios": (0.5,), "position_mode": "kept"},
            r"Unknown position mode 'kept'; known: preserved, renumbered",
        ),
    ],
)
def test_impossible_schedules(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RerouteError, match=message):
        Schedule(**fields)


def test_validate_against_the_model() -> None:
    growing = Schedule((2, 7), (0.25, 0.5))
    growing.validate(8, "route")
    with pytest.raises(RerouteError, match=r"layer 7 does not exist: the model has 7 layers, 0 to 6"):
        growing.validate(7, "route")
    with pytest.raises(RerouteError, match=r"must not grow \(0.25, then 0.5\).*Use action 'route'"):
        growing.validate(8, "remove")
    renumbered = Schedule((2, 7), (0.5, 0.5), position_mode="renumbered")
    renumbered.validate(8, "remove")
    with pytest.raises(RerouteError, match=r"need action 'remove'.*position_mode='preserved'"):
        renumbered.validate(8, "route")
    action: Any = "delete"
    with pytest.raises(RerouteError, match=r"Unknown action 'delete'; known: remove, route"):
        growing.validate(8, action)


BAD_JSON = ["", b"\xff", {"layers": [3]}, "[1, 2]", '{"layers": [3]}', '{"layers": [3], "ratios": [1], "x": 1}', "null"]


@pytest.mark.parametrize("text", [*BAD_JSON, pytest.param("[" * 100_000, id="deep")])
def test_bad_json(text: Any) -> None:
    with pytest.raises(RerouteError, match=r"Not a schedule: .* such as \{"):
        Schedule.from_json(text)


def test_nested_counts() -> None:
    """Shares of the stage before are what they were before they became shares of all: (0.01 · 0.03) / 0.01 is below."""
    schedule = Schedule((0, 3, 5), (0.01, 0.01 * 0.03, 0.0), rounding="nested")
    assert schedule.counts(10_000) == (100, 3, 0)
    assert schedule.counts(10) == (1, 1, 0)
    assert Schedule((0, 3, 5), (0.25, 0.5, 0.5), rounding="nested").counts(10) == (3, 6, 6)
    assert Schedule((0, 3), (1.0, 1.0), rounding="nested").counts(7) == (7, 7)
    assert Schedule((0, 3, 5), (0.25, 0.125, 0.0), rounding="nested_floor").counts(11) == (2, 1, 0)
    assert Schedule((0, 3), (0.25, 0.125), rounding="nested_floor").counts(3) == (1, 1)


def test_a_decision_has_an_action_of_its_own() -> None:
    schedule = Schedule((0, 3, 5), (0.5, 0.2, 0.5), actions=("remove", "route", "route"))
    schedule.validate(8, "route")
    schedule.validate(8, "remove")
    assert schedule.each_action("remove") == ("remove", "route", "route")
    assert Schedule((0, 3), (0.5, 0.2)).each_action("remove") == ("remove", "remove")
    with pytest.raises(RerouteError, match=r"must not grow \(0\.5, then 0\.6\)"):
        Schedule((0, 3, 5), (0.5, 0.2, 0.6), actions=("remove", "route", "route")).validate(8, "route")
    with pytest.raises(RerouteError, match="Renumbered positions need action 'remove'"):
        Schedule((0, 3), (0.5, 0.2), (LastTokenAttention(),), "floor", "renumbered", ("remove", "route")).validate(
            8, "remove"
        )
    assert "actions" not in Schedule((0, 3), (0.5, 0.2)).to_json()


def test_errors() -> None:
    assert issubclass(RerouteError, ValueError)
    assert issubclass(UnsupportedModelError, RerouteError)
    assert issubclass(UnsupportedCacheError, RerouteError)
    assert str(unknown("method", "FastVee", ["pdrop", "fastv"])) == (
        "Unknown method 'FastVee'; known: fastv, pdrop. Did you mean 'fastv'?"
    )
    assert str(unknown("method", 3, ["fastv"])) == "Unknown method 3; known: fastv."
