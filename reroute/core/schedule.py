"""A schedule says before which layers a decision is made and how many visual tokens it keeps."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from math import ceil, floor
from typing import Any, Literal, get_args

from ..checks import check_name, items, number, whole
from ..errors import RerouteError
from ..rankers import RANKERS, LastTokenAttention, Ranker
from ..rankers.base import check_ranker
from .action import Action

__all__ = ["Action", "PositionMode", "Rounding", "Schedule", "count"]

Rounding = Literal["floor", "floor0", "half_even", "nested", "nested_floor"]
"""From N * ratio to a count: ``floor`` keeps at least 1 (Reroute), ``floor0`` may keep none (PDrop's
original), ``half_even`` rounds to the nearest, halves to the even one (FastV for Transformers). ``nested`` rounds the
first count up, and each later one is a share of the one before, rounded down, at least 1 (Nüwa for Qwen2.5-VL);
``nested_floor`` is the same with the first one rounded down, at least 1 (VScan for Qwen2.5-VL)."""

PositionMode = Literal["preserved", "renumbered"]
"""Position ids of the kept tokens: those of the full prompt, or counted anew from 0 after each
decision (PDrop's original, only with ``remove``)."""


def count(n: int, ratio: float, rounding: Rounding = "floor") -> int:
    """How many of ``n`` visual tokens a ratio stands for; never more than ``n``.

    The product is taken in binary floating point, as in the released code: 0.29 of 100 is 28. A ratio of 0 is none.
    """
    if ratio == 0:
        return 0
    kept = floor(n * ratio)
    if rounding in ("half_even", "nested"):
        kept = round(n * ratio) if rounding == "half_even" else ceil(n * ratio)
    return min(n, max(1, kept) if rounding in ("floor", "nested_floor") else kept)


def tidy(value: float) -> float:
    """The simple fraction that ``value`` misses by rounding: floor(576 * 0.4999…) loses a token."""
    near = float(Fraction(value).limit_denominator(10_000))
    return near if near > 0 and abs(near - value) < 1e-12 else value


@dataclass(frozen=True)
class Schedule:
    """A list of decisions, column by column: before which layer, how many stay, ranked by what.

    - ``layers``: a decision is made before each of these layers, which already run on the result.
    - ``ratios``: kept share per stage, always relative to the prompt's N visual tokens; 0 keeps none.
    - ``rankers``: one per decision, or a single one for all; attention of the last prompt token if none is given.
    - ``actions``: what becomes of the others at each decision; () is the action of the call at all of them. Who comes
      after a removal competes among those that it left.

    Raises:
        RerouteError: values that cannot be right whatever the model.
    """

    layers: tuple[int, ...]
    ratios: tuple[float, ...]
    rankers: tuple[Ranker, ...] = (LastTokenAttention(),)
    rounding: Rounding = "floor"
    position_mode: PositionMode = "preserved"
    actions: tuple[Action, ...] = ()

    def __post_init__(self) -> None:
        """Turn sequences into tuples and check them."""
        try:
            object.__setattr__(self, "layers", tuple(map(whole, items(self.layers))))
            object.__setattr__(self, "ratios", tuple(map(number, items(self.ratios))))
        except (TypeError, ValueError, OverflowError):
            raise RerouteError(
                "A schedule needs a sequence of layer numbers and a sequence of ratios, such as "
                f"layers=(3, 7), ratios=(0.5, 0.5); got layers={self.layers!r}, ratios={self.ratios!r}."
            ) from None
        if not self.layers:
            raise RerouteError("A schedule needs at least one routing layer; to run the plain model, disable routing.")
        if len(self.layers) != len(self.ratios):
            raise RerouteError(
                f"Give one ratio per routing layer: got ratios {self.ratios} for the layers {self.layers}."
            )
        object.__setattr__(self, "rankers", _one_each(self.rankers, len(self.layers)))
        if self.layers[0] < 0 or any(a >= b for a, b in pairwise(self.layers)):
            raise RerouteError(f"Routing layers must be 0 or more and strictly increasing, not {self.layers}.")
        scoring = [layer + ranker.layer_offset for layer, ranker in zip(self.layers, self.rankers, strict=True)]
        if scoring[0] < 0 or any(a >= b for a, b in pairwise(scoring)):
            raise RerouteError(
                f"Decisions must be made one after the other, from layer 0 on; those of the layers {self.layers} would "
                f"be made before the layers {tuple(scoring)}: a ranker of layer_offset=-1 decides a layer earlier."
            )
        for layer, score_layer, ranker in zip(self.layers, scoring, self.rankers, strict=True):
            looks = ranker.looks_before(layer)
            if not all(0 <= look <= score_layer for look in looks):
                raise RerouteError(
                    f"{type(ranker).__name__} cannot decide before layer {layer}: it looks at the input of the layers "
                    f"{tuple(looks)}, which have to be there and to come first. Choose a later layer."
                )
        if any(not 0 <= ratio <= 1 for ratio in self.ratios):
            raise RerouteError(f"Ratios must be from 0 to 1, not {self.ratios}.")
        check_name("rounding", self.rounding, get_args(Rounding))
        check_name("position mode", self.position_mode, get_args(PositionMode))
        object.__setattr__(self, "actions", _actions(self.actions, len(self.layers)))

    def validate(self, num_layers: int, action: Action) -> None:
        """Check the schedule against a model of ``num_layers`` decoder layers and an action.

        Raises:
            RerouteError: it does not fit; says what would.
        """
        check_name("action", action, get_args(Action))
        if self.layers[-1] >= num_layers:
            raise RerouteError(
                f"Routing layer {self.layers[-1]} does not exist: the model has {num_layers} layers, "
                f"0 to {num_layers - 1}. Choose lower layers."
            )
        left, actions = 1.0, self.each_action(action)
        for ratio, does in zip(self.ratios, actions, strict=True):
            if ratio > left:
                raise RerouteError(
                    f"With action 'remove' ratios must not grow ({left}, then {ratio}): a "
                    "removed token cannot return. Use action 'route' or ratios that only fall."
                )
            left = ratio if does == "remove" else left
        if self.position_mode == "renumbered" and "route" in actions:
            raise RerouteError(
                "Renumbered positions need action 'remove': a deferred token keeps its place in the "
                "prompt. Use position_mode='preserved' with action 'route'."
            )

    def stage_of(self, layer: int) -> int:
        """The stage that ``layer`` belongs to; -1 before the first routing layer."""
        return bisect_right(self.layers, layer) - 1

    @cached_property
    def looks(self) -> dict[int, tuple[Ranker, ...]]:
        """Which rankers make notes on the input of each layer, equal ones once."""
        looks: dict[int, tuple[Ranker, ...]] = {}
        for layer, ranker in zip(self.layers, self.rankers, strict=True):
            for look in ranker.looks_before(layer):
                its = looks.get(look, ())
                looks[look] = its if ranker in its else (*its, ranker)
        return looks

    @cached_property
    def first_look(self) -> int:
        """The first layer whose input is looked at: before it, every token has run as in the plain model."""
        return min([self.layers[0] + self.rankers[0].layer_offset, *self.looks])

    def next_stage(self, look: int) -> int:
        """The stage that is not entered yet where notes are made on the input of layer ``look``."""
        columns = zip(self.layers, self.rankers, strict=True)
        return next(i for i, (x, r) in enumerate(columns) if x > look or x + r.layer_offset == look)

    def each_action(self, action: Action) -> tuple[Action, ...]:
        """What becomes of the others at each decision, under the ``action`` of the call."""
        return self.actions or (action,) * len(self.layers)

    def counts(self, n: int) -> tuple[int, ...]:
        """Visual tokens kept in each stage, of ``n`` in the prompt."""
        kept = [count(n, ratio, self.rounding) for ratio in self.ratios]
        if self.rounding in ("nested", "nested_floor"):
            for stage, (before, ratio) in enumerate(pairwise(self.ratios)):
                share = tidy(ratio / before) if before else 0.0  # as it was, before it became a share of N
                kept[stage + 1] = min(n, max(1, floor(kept[stage] * share)) if ratio else 0)
        return tuple(kept)

    def per_layer(self, n: int, num_layers: int) -> list[int]:
        """Visual tokens that each of the model's layers runs, of ``n`` in the prompt."""
        counts = (*self.counts(n), n)  # stage -1, the dense layers, is the last entry
        return [counts[self.stage_of(layer)] for layer in range(num_layers)]

    def to_json(self) -> str:
        """The schedule as a JSON object; ``from_json`` gives an equal one back.

        Raises:
            RerouteError: a ranker has no name in ``reroute.rankers.RANKERS``, or options that JSON cannot hold.
        """
        try:
            return json.dumps(self.as_dict())
        except TypeError as error:
            raise RerouteError(f"The options of a ranker cannot be stored: {error}.") from None

    def as_dict(self) -> dict[str, Any]:
        """What ``to_json`` writes. Rankers are left out where all are the default, actions where there are none."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        if not self.actions:
            del columns["actions"]
        if set(self.rankers) == {LastTokenAttention()}:
            del columns["rankers"]
        else:
            columns["rankers"] = tuple(map(RANKERS.named, self.rankers))
        return columns

    @classmethod
    def from_dict(cls, columns: Mapping[str, Any]) -> Schedule:
        """The schedule of which ``as_dict`` is ``columns``. Raises what the constructor does, and TypeError."""
        columns = dict(columns)
        if "rankers" in columns:
            columns["rankers"] = tuple(map(RANKERS.built, items(columns["rankers"])))
        return cls(**columns)

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """The schedule that ``to_json`` wrote.

        Raises:
            RerouteError: not such an object, or values that cannot be right.
        """
        try:
            return cls.from_dict(json.loads(text))
        except RerouteError:
            raise
        except (TypeError, KeyError, ValueError, RecursionError) as error:
            raise RerouteError(
                f"Not a schedule: {error}. Pass what Schedule.to_json wrote, such as "
                '{"layers": [3], "ratios": [0.25]}.'
            ) from None


def _actions(given: Any, count: int) -> tuple[Action, ...]:
    """One action per decision, or none. RerouteError otherwise."""
    try:
        actions = tuple(items(given))
    except TypeError:
        actions = (None,)
    if None in actions or len(actions) not in (0, count):
        raise RerouteError(
            f"Give one action per routing layer, such as ('remove', 'route'), or none: got {given!r} for {count} of "
            "them."
        )
    for action in actions:
        check_name("action", action, get_args(Action))
    return actions


def _one_each(rankers: Any, count: int) -> tuple[Ranker, ...]:
    """One ranker per decision. RerouteError if they are none, or too few."""
    if isinstance(rankers, Ranker):
        rankers = (rankers,)
    try:
        each = tuple(items(rankers))
    except TypeError:
        each = (rankers,)
    each = each * count if len(each) == 1 else each
    for ranker in each:
        check_ranker(ranker)
    if len(each) != count:
        raise RerouteError(f"Give one ranker, or one per routing layer: got {len(each)} for {count} layers.")
    return each
