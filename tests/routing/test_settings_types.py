"""Settings of another type leave a model as it is: plain, or routed as before."""

from __future__ import annotations

from typing import Any

import pytest
from models import Tiny
from support import RULES, enable, snapshot

import reroute
from reroute import RoutingConfig
from reroute.errors import RerouteError

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"keep": "0.33"}, "must be a number"),
    ({"keep": [0.3]}, "must be a number"),
    ({"schedule": '{"layers": [2], "ratios": [0.5]}'}, r"must be a reroute\.Schedule"),
    ({"schedule": {"layers": (2,), "ratios": (0.5,)}}, r"must be a reroute\.Schedule"),
    ({"method": ["pdrop"]}, "one of the names"),
    ({"method": ""}, "Unknown method ''"),
    ({"action": ["route"]}, "Unknown action"),
    ({"action": ""}, "Unknown action ''"),
    ({"config": {"keep": 0.3}}, r"must be a reroute\.RoutingConfig"),
    ({"config": RoutingConfig(keep=0.3).to_json()}, r"must be a reroute\.RoutingConfig"),
]
OF_ENABLE: list[tuple[dict[str, Any], str]] = [
    ({"pool": "256MiB"}, r"must be a reroute_kernels\.PagedPool"),
    ({"pool": 256 << 20}, r"must be a reroute_kernels\.PagedPool"),
    ({"backend": ["torch"]}, "Unknown backend"),
    ({"trace": "yes"}, "trace must be True or False"),
]


@pytest.mark.parametrize(("settings", "message"), [*WRONG, *OF_ENABLE])
@pytest.mark.parametrize("routed", [False, True], ids=["plain", "routed"])
def test_enable_changes_nothing(tiny: Tiny, settings: dict[str, Any], message: str, routed: bool) -> None:
    handle = enable(tiny, RULES[0]) if routed else None
    state = snapshot(tiny.model)
    with pytest.raises(RerouteError, match=message):
        reroute.enable(tiny.model, **settings)
    assert reroute.handle_of(tiny.model) is handle
    assert snapshot(tiny.model) == state


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_settings_of_one_call(tiny: Tiny, settings: dict[str, Any], message: str) -> None:
    with enable(tiny, RULES[0]) as handle, pytest.raises(RerouteError, match=message):
        handle.at(**settings)


@pytest.mark.parametrize("sizes", [{"visual": "64"}, {"visual": 64, "batch": 1.5}, {"visual": None}])
def test_a_warm_up_takes_whole_numbers(tiny: Tiny, sizes: Any) -> None:
    with (
        enable(tiny, RULES[0]) as handle,
        pytest.raises(RerouteError, match="at least one visual token and one prompt"),
    ):
        handle.warm_up(**sizes)


@pytest.mark.parametrize("change", [{"keep": "0.3"}, {"config": {"keep": 0.3}}])
def test_all_models_at_once(tiny: Tiny, change: dict[str, Any]) -> None:
    with pytest.raises(RerouteError, match="must be a"):
        reroute.enable(**change)
    assert reroute.handle_of(tiny.model) is None
