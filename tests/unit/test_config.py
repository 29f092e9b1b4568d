"""Settings as one object, written and read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

import reroute
from reroute import RoutingConfig, Schedule
from reroute.errors import RerouteError
from reroute.methods import METHODS, Diverse, FastV, PDrop, Random
from reroute.rankers import RANKERS, LastTokenAttention, RandomScores, RankInputs, ScoreRanker


@dataclass(frozen=True)
class Unknown(ScoreRanker):
    def scores(self, inputs: RankInputs) -> Any: ...


CONFIGS = [
    RoutingConfig(),
    RoutingConfig("fastv", "remove", keep=1 / 3, backend="torch", trace=True, reopens=True),
    RoutingConfig(PDrop((2, 4), (0.5, 0.25), "floor0")),
    RoutingConfig(Random(ranker=RandomScores(seed=3)), keep=0.5),
    RoutingConfig(FastV(ratio=0.1, ranker=RandomScores())),
    RoutingConfig(schedule=Schedule((2, 7), (0.5, 0.25), (RandomScores(), LastTokenAttention(-1)), "half_even")),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_json_there_and_back(config: RoutingConfig) -> None:
    text = config.to_json()
    assert RoutingConfig.from_json(text) == config
    assert json.loads(text)["version"] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Not a routing configuration"),
        pytest.param("[" * 100_000, "Not a routing configuration: .*recursion", id="deep"),
        ('{"version": 1, "keep": "0.5"}', "must be a number .* not '0.5'"),
        ('{"version": 1, "schedule": {"layers": "2", "ratios": [0.5]}}', "sequence of layer numbers"),
        ('{"version": 1, "schedule": "uniform"}', "Not a routing configuration"),
        ("[1]", "Not a routing configuration"),
        ('{"keep": 0.5}', "version None cannot be read"),
        ('{"version": 2}', "version 2 cannot be read; this release knows version 1"),
        ('{"version": 1, "kep": 0.5}', "unexpected keyword argument 'kep'"),
        ('{"version": 1, "keep": 2}', "at most 1"),
        ('{"version": 1, "method": {"name": "fastvv", "ranker": {"name": "random_scores"}}}', "Did you mean 'fastv'"),
        ('{"version": 1, "method": {"name": "fastv", "ranker": {"name": "randm_scores"}}}', "Unknown ranker"),
        ('{"version": 1, "method": {"ranker": {"name": "random_scores"}}}', "Not a routing configuration: 'name'"),
        (
            '{"version": 1, "method": {"name": "fastv", "ranker": "random"}}',
            "'random'",
        ),
        ('{"version": 1, "schedule": {"layers": [2], "ratios": [0.5], "rankers": ["random"]}}', "Not a routing conf"),
    ],
)
def test_what_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(RerouteError, match=message):
        RoutingConfig.from_json(text)


@dataclass(frozen=True)
class Weighted(Unknown):
    weight: complex = 1j


def test_what_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RerouteError, match=r"Unknown cannot be stored: .* a name in reroute\.rankers\.RANKERS"):
        RoutingConfig(FastV(ranker=Unknown())).to_json()
    monkeypatch.setitem(RANKERS, "weighted", Weighted)
    with pytest.raises(RerouteError, match=r"'fastv' cannot be stored: .* not JSON serializable"):
        RoutingConfig(FastV(ranker=Weighted())).to_json()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"action": "prune"}, "known: remove, route"),
        ({"method": "fastvv"}, "Did you mean 'fastv'"),
        ({"keep": 0.0}, "above 0"),
        ({"keep": 0.5, "schedule": Schedule((2,), (0.5,))}, "not both"),
        ({"method": "fastv", "schedule": Schedule((2,), (0.5,))}, "not both: a method is a name"),
        ({"backend": "cuda"}, "Unknown backend"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RerouteError, match=message):
        RoutingConfig(**settings)


def test_what_settings_mean_for_a_model() -> None:
    assert RoutingConfig(keep=0.2).schedule_for(32) == Diverse().with_budget(0.2, 32, "route").schedule(32, "route")
    assert RoutingConfig().schedule_for(32) == RoutingConfig(keep=1 / 3).schedule_for(32)
    schedule = Schedule((2,), (0.5,))
    explicit = RoutingConfig(schedule=schedule)
    assert (explicit.schedule_for(8), explicit.method_name) == (schedule, "schedule")
    assert schedule.rankers == (LastTokenAttention(),)
    assert {RoutingConfig(name).method_name for name in METHODS} == set(METHODS)


def test_a_config_or_single_settings() -> None:
    with pytest.raises(RerouteError, match="not both"):
        reroute.enable(config=RoutingConfig(keep=0.5), keep=0.5)


SCHEDULE = Schedule((2, 7), (0.5, 0.25))
REMOVING = RoutingConfig(action="remove", schedule=SCHEDULE, trace=True)


@pytest.mark.parametrize(
    ("config", "changes", "expected"),
    [
        (RoutingConfig(keep=0.3), {"keep": 0.2}, RoutingConfig(keep=0.2)),
        (RoutingConfig("fastv", keep=0.3), {"method": "pdrop"}, RoutingConfig("pdrop", keep=0.3)),
        (RoutingConfig("random", keep=0.3), {"schedule": SCHEDULE}, RoutingConfig(schedule=SCHEDULE)),
        (RoutingConfig(schedule=SCHEDULE), {"keep": 0.2}, RoutingConfig(keep=0.2)),
        (RoutingConfig(schedule=SCHEDULE), {"method": "fastv"}, RoutingConfig("fastv")),
        (RoutingConfig(schedule=SCHEDULE, trace=True), {"action": "remove"}, REMOVING),
        (RoutingConfig(reopens=True), {"keep": 0.2}, RoutingConfig(keep=0.2, reopens=True)),
        (RoutingConfig(keep=0.2, reopens=True), {"reopens": False}, RoutingConfig(keep=0.2)),
        (RoutingConfig("fastv", keep=0.3, backend="torch"), {}, RoutingConfig("fastv", keep=0.3, backend="torch")),
    ],
)
def test_changes(config: RoutingConfig, changes: dict[str, Any], expected: RoutingConfig) -> None:
    """Ratios come from one place: a schedule ends a budget, and a budget or a method ends a schedule."""
    assert config.changed(**changes) == expected


def test_changes_that_cannot_be() -> None:
    with pytest.raises(RerouteError, match="not both"):
        RoutingConfig().changed(keep=0.2, schedule=SCHEDULE)
