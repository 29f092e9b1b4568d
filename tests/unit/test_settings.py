"""Settings of another type than they have: from a command line, a JSON file, or by mistake."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reroute import RoutingConfig, Schedule
from reroute.config import check_arguments
from reroute.core.solver import solve
from reroute.errors import RerouteError
from reroute.methods import FastV, PDrop, Random, get
from reroute.rankers import LastTokenAttention, RandomScores, RankInputs
from reroute_kernels import PagedPool

SCHEDULE = Schedule((2, 4), (0.5, 0.25))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("0.33", "must be a number above 0 and at most 1, such as keep=0.33, not '0.33'"),
        (b"0.33", "not b'0.33'"),
        ([0.3], r"not \[0\.3\]"),
        ((0.5, 0.25), "not "),
        ({"keep": 0.3}, "not "),
        (True, "not True"),
        (False, "not False"),
        (float("nan"), "not nan"),
        (float("inf"), "not inf"),
        (10**400, "not 1"),
        (0.3j, "not "),
        (0, "not 0"),
        (-0.5, r"not -0\.5"),
        (33, "not 33"),
        (np.zeros(3), "not array"),
        (torch.zeros(3), "not tensor"),
    ],
)
def test_a_budget_is_a_number(keep: Any, message: str) -> None:
    with pytest.raises(RerouteError, match=message):
        RoutingConfig(keep=keep)
    with pytest.raises(RerouteError, match=message):
        solve("uniform", (2, 4), 8, keep)


@pytest.mark.parametrize(
    "keep", [0.5, Fraction(1, 2), Decimal("0.5"), np.float32(0.5), np.float64(0.5), torch.tensor(0.5)]
)
def test_any_number_is_a_budget(keep: Any) -> None:
    config = RoutingConfig(keep=keep)
    assert config == RoutingConfig(keep=0.5)
    assert type(config.keep) is float
    assert RoutingConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("method", [FastV, PDrop, Random])
@pytest.mark.parametrize("ranker", ["random_scores", RandomScores, None, ()])
def test_rankers_of_another_type(method: Callable[..., Any], ranker: Any) -> None:
    with pytest.raises(RerouteError, match="A ranker must be a Ranker such as"):
        method(ranker=ranker)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("schedule", SCHEDULE.to_json(), r"must be a reroute\.Schedule, not '.*Schedule\.from_json\(text\) of JSON"),
        ("schedule", {"layers": (2,), "ratios": (0.5,)}, r"not \{.*Schedule\.from_dict\(columns\) of a dict"),
        ("schedule", ((2, 4), (0.5, 0.25)), r"pass Schedule\(layers="),
        ("schedule", Schedule, r"pass Schedule\(layers="),
        ("method", FastV, r"one of the names .* or a Method such as FastV\("),
        ("method", ["fastv"], "one of the names"),
        ("method", {"name": "fastv"}, "one of the names"),
        ("method", 0.33, "one of the names"),
        ("action", None, "Unknown action None; known: remove, route"),
        ("action", ["route"], r"Unknown action \['route'\]"),
        ("action", np.array(["route"]), "Unknown action"),
        ("action", True, "Unknown action True"),
        ("backend", None, "Unknown backend None; known: auto, torch, triton"),
        ("backend", {"triton"}, "Unknown backend"),
        ("backend", torch.device("cuda"), "Unknown backend"),
        ("trace", "false", "trace must be True or False, not 'false'"),
        ("trace", 1, "trace must be True or False, not 1"),
        ("trace", None, "trace must be True or False"),
    ],
)
def test_settings_of_another_type(setting: str, value: Any, message: str) -> None:
    with pytest.raises(RerouteError, match=message):
        RoutingConfig(**{setting: value})


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (FastV, {"layer": "3"}, r"number of a layer and a ratio, such as layer=3, ratio=0\.25; got layer='3'"),
        (FastV, {"layer": 3.5}, r"got layer=3\.5"),
        (FastV, {"layer": True}, "got layer=True"),
        (FastV, {"layer": [3]}, r"got layer=\[3\]"),
        (FastV, {"ratio": "0.25"}, r"ratio='0\.25'"),
        (FastV, {"ratio": None}, "ratio=None"),
        (Random, {"ratio": [0.25]}, r"^Random takes .* ratio=\[0\.25\]"),
        (PDrop, {"layers": "27"}, r"sequence of layers and a sequence of ratios.* got layers='27'"),
        (PDrop, {"layers": 7}, "got layers=7"),
        (PDrop, {"layers": ("2", "7")}, "got layers="),
        (PDrop, {"layers": (float("nan"),)}, r"got layers=\(nan,\)"),
        (PDrop, {"layers": (float("inf"),)}, r"got layers=\(inf,\)"),
        (PDrop, {"ratios": 0.5}, r"ratios=0\.5"),
        (PDrop, {"ratios": "1"}, "ratios='1'"),
        (RandomScores, {"seed": "1"}, "whole number, such as seed=1, not '1'"),
        (RandomScores, {"seed": 1.5}, r"whole number, such as seed=1, not 1\.5"),
    ],
)
def test_methods_and_rankers_of_other_types(kind: type, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RerouteError, match=message):
        kind(**arguments)


def test_lists_are_as_good_as_tuples() -> None:
    lists: Any = [2, 0.5], [0.5, 0.25]
    method = PDrop(*lists)
    assert method == PDrop((2, 0.5), (0.5, 0.25))
    assert method.schedule(8, "route") == Schedule((2, 4), (0.5, 0.25))
    assert RoutingConfig.from_json(RoutingConfig(method).to_json()) == RoutingConfig(method)


@pytest.mark.parametrize("seed", [2**63, -(2**70), 10**30])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    inputs = RankInputs([torch.zeros(5, 4)], torch.zeros(1, 4), layer=3, stage=1)
    assert RandomScores(seed).scores(inputs)[0].shape == (5,)


def test_a_pool_and_a_config_are_objects() -> None:
    check_arguments(None, None)
    check_arguments(RoutingConfig(keep=0.5), PagedPool(8, torch.float32, "cpu"))
    pools: list[Any] = ["256MiB", 256 << 20, PagedPool, {"max_bytes": 1}]
    for pool in pools:
        with pytest.raises(RerouteError, match=r"pool must be a reroute_kernels\.PagedPool, not .*max_bytes=256 << 20"):
            check_arguments(None, pool)
    configs: list[Any] = [RoutingConfig().to_json(), {"keep": 0.5}, RoutingConfig, 0.5]
    for config in configs:
        with pytest.raises(RerouteError, match=r"config must be a reroute\.RoutingConfig, not .*from_json\(text\)"):
            check_arguments(config, None)


# --- anything -----------------------------------------------------------------------------------------------------

JUNK: list[Any] = [
    *(None, True, 0, 1, -1, 2, 10**400, 0.5, 1.0, float("nan"), float("inf"), 1j),
    *("", "0.5", "pdrop", "route", "floor", "[2]", b"2", bytearray(b"2")),
    *((), (2,), [2, 4], (0.5, 0.25), [[2]], ["2"], {2}, {2: 0.5}, {"name": "fastv"}, range(3)),
    *(object(), Exception, len, FastV, FastV(), RandomScores(), SCHEDULE, RoutingConfig(), Fraction(1, 2)),
    *(np.float32(0.5), np.array(2), np.array([2, 4]), np.array(["route"]), np.bool_(True)),
    *(torch.tensor(0.5), torch.tensor([2, 4]), torch.tensor([]), torch.float16),
]
MAKERS: list[tuple[Callable[..., Any], tuple[str, ...]]] = [
    (RoutingConfig, ("method", "action", "keep", "schedule", "backend", "trace")),
    (Schedule, ("layers", "ratios", "rankers", "rounding", "position_mode")),
    (FastV, ("layer", "ratio", "rounding", "ranker")),
    (PDrop, ("layers", "ratios", "rounding", "position_mode", "ranker")),
    (RandomScores, ("seed",)),
    (LastTokenAttention, ("layer_offset",)),
    (check_arguments, ("config", "pool")),
]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(MAKERS), st.data())
def test_any_setting_is_read_or_refused(maker: tuple[Callable[..., Any], tuple[str, ...]], data: st.DataObject) -> None:
    """And what is read can be worked out for a model, and stored, or is refused then."""
    make, names = maker
    needed = ["layers", "ratios"] if make is Schedule else ["config", "pool"] if make is check_arguments else []
    chosen = {*needed, *data.draw(st.sets(st.sampled_from(names), max_size=2))}
    given = {name: data.draw(st.sampled_from(JUNK), label=name) for name in sorted(chosen)}
    with suppress(RerouteError):
        made = make(**given)
        config = made if isinstance(made, RoutingConfig) else None
        if isinstance(made, Schedule):
            config = RoutingConfig(schedule=made)
        elif isinstance(made, (FastV, PDrop)):
            config = RoutingConfig(get(made))
        if config is not None:
            assert isinstance(config.schedule_for(32), Schedule)
            assert RoutingConfig.from_json(config.to_json()) == config
