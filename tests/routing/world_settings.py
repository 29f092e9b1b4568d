"""Settings that a world is given, what they mean, and what it may answer when it refuses."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from oracle import Rules

import reroute
from reroute.errors import RerouteError
from reroute.rankers import LastTokenAttention

__all__ = ["REFUSALS", "SETTINGS", "Settings", "changed", "rules_of"]

Settings = dict[str, Any]

SETTINGS: dict[str, Settings] = {
    "pyramid": {"schedule": reroute.Schedule((1, 3), (0.5, 0.25))},
    "growing": {"schedule": reroute.Schedule((0, 2), (0.3, 1.0)), "reopens": True},
    "removal": {"schedule": reroute.Schedule((1, 3), (0.5, 0.25)), "action": "remove"},
    "scored before": {"schedule": reroute.Schedule((2, 4), (0.4, 0.2), (LastTokenAttention(-1),))},
    "none in the end": {"schedule": reroute.Schedule((1, 4), (0.1, 0.01), rounding="floor0")},
    "renumbered": {
        "schedule": reroute.Schedule((1, 3), (0.5, 0.25), position_mode="renumbered"),
        "action": "remove",
    },
    "reopening": {"schedule": reroute.Schedule((1, 3), (0.5, 0.25)), "reopens": True},
    "reopening early": {"schedule": reroute.Schedule((2, 4), (0.4, 0.2), (LastTokenAttention(-1),)), "reopens": True},
    "reopening no more": {"reopens": False},
    "everything": {"keep": 1.0},
    "half": {"keep": 0.5},
    "fastv": {"method": "fastv", "keep": 0.7},
    "removed": {"action": "remove"},
    "none": {"keep": 0.0},
}
"""Some are right for one family only, or depend on what they change, or are always wrong."""

REFUSALS = {
    "busy": "A forward or a generation of this model runs",
    "in a block": "in a with block that has not ended",
    "disabled": "Routing of this model was disabled",
    "half filled": "half filled",
    "without routing": "filled while routing was on, and this forward runs without it",
    "shape": "The plan in use is for tokens",
    "labels": "does not know the labels",
    "renumbered": "position_mode='renumbered'",
    "no states": "and a later turn cannot choose again",
    "padded text": "began with padded text",
    "crop": r"Cannot crop\(",
    "settings": "",
}


def rules_of(settings: Settings, family: str) -> Rules | None:
    """What ``settings`` mean for a model of five layers; None if it cannot be routed by them."""
    try:
        config = reroute.RoutingConfig(**settings)
        schedule = config.schedule_for(5)
    except RerouteError:
        return None
    offset = schedule.rankers[0].layer_offset
    rules = Rules(schedule.layers, schedule.ratios, config.action, schedule.rounding, schedule.position_mode, offset)
    is_removal, is_renumbered = rules.action == "remove", rules.position_mode == "renumbered"
    grows = any(after > before for before, after in pairwise(rules.ratios))
    is_wrong = (is_removal and grows) or (is_renumbered and (family == "qwen" or not is_removal))
    return None if is_wrong else rules


def changed(settings: Settings, given: Settings) -> Settings:
    """``settings`` of a handle with those ``given`` to ``at``."""
    gone = {"keep", "method"} if "schedule" in given else {"schedule"} if {"keep", "method"} & set(given) else set()
    return {**{name: value for name, value in settings.items() if name not in gone}, **given}
