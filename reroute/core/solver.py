"""Which ratios meet a budget ``keep`` = avg_T / N: the mean over *all* layers of the share that runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

from ..checks import check_name, number, shown
from ..errors import RerouteError
from .schedule import Schedule, tidy

__all__ = ["RatioFamily", "check_keep", "scale_layers", "solve"]

RatioFamily = Literal["uniform", "pyramid", "geometric"]
"""How ratios follow from one parameter: r, r, r… or a, a, a/2, a/4… or r, r², r³…"""

_RATIO: dict[RatioFamily, Callable[[float, int], float]] = {
    "uniform": lambda r, stage: r,
    "pyramid": lambda a, stage: a * 0.5 ** max(0, stage - 1),
    "geometric": lambda r, stage: r ** (stage + 1),
}


def scale_layers(layers_of_32: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """The routing layers of a 32-layer model, for a model of another depth.

    A layer x becomes floor(x * num_layers / 32). Only the first stays as it is while that is below
    the second: how soon visual tokens may be deferred hardly depends on depth. It becomes at least
    1. In shallow models several layers may become one, so fewer can come out than went in: compute
    the ratios on what comes out (``solve`` does), do not cut a list that was made for the input.
    """
    first, *later = layers_of_32
    later = [layer * num_layers // 32 for layer in later]
    if later and first >= later[0]:
        first = max(1, first * num_layers // 32)
    return tuple(sorted({first, *(layer for layer in later if layer > first)}))


def check_keep(keep: float) -> float:
    """The budget ``keep`` = avg_T / N as a float; RerouteError if it is none that a model can have."""
    try:
        share = number(keep)
    except (TypeError, ValueError, OverflowError):
        share = 0.0
    if not 0 < share <= 1:
        raise RerouteError(
            f"keep = avg_T / N must be a number above 0 and at most 1, such as keep=0.33, not {shown(keep)}."
        )
    return share


def solve(
    family: RatioFamily | Sequence[float], layers: Sequence[int], num_layers: int, keep: float
) -> tuple[float, ...]:
    """Ratios of a family, one per routing layer, for the budget ``keep`` = avg_T / N.

    A family may be given by its proportions, one per routing layer: (40, 13, 13, 4).

    The average is that of the ratios themselves, clipped to 1; rounding down to counts takes less
    than one token off it. ``keep=1`` gives exactly 1.0 everywhere.

    Raises:
        RerouteError: unknown family, layers that do not fit, or a budget that no ratios reach.
    """
    ratio = _family(family, len(layers))
    Schedule(tuple(layers), (1.0,) * len(layers)).validate(num_layers, "route")
    keep = check_keep(keep)
    if keep == 1:
        return (1.0,) * len(layers)
    target = keep * num_layers - layers[0]
    if target <= 0:
        raise RerouteError(
            f"keep = {keep} is out of reach: layers before the first routing layer run all visual "
            f"tokens, so with routing from layer {layers[0]} on, {num_layers} layers cannot get down "
            f"to {layers[0]}/{num_layers} = {layers[0] / num_layers:.4g}. "
            "Choose a larger keep or an earlier first routing layer."
        )
    widths = [end - start for start, end in pairwise((*layers, num_layers))]

    def ratios(free: float) -> tuple[float, ...]:
        return tuple(min(1.0, ratio(free, stage)) for stage in range(len(widths)))

    low, high = 0.0, 1.0
    while sum(w * r for w, r in zip(widths, ratios(high), strict=True)) < target:
        high *= 2
    while low < (middle := (low + high) / 2) < high:
        if sum(w * r for w, r in zip(widths, ratios(middle), strict=True)) < target:
            low = middle
        else:
            high = middle
    return ratios(tidy(high))


def _family(family: RatioFamily | Sequence[float], stages: int) -> Callable[[float, int], float]:
    """The ratio of a stage, which grows with a number that is to be found."""
    if isinstance(family, str):
        check_name("ratio family", family, _RATIO)
        return _RATIO[family]
    if len(family) != stages or min(family) <= 0:
        raise RerouteError(f"Give one proportion above 0 per routing layer: got {tuple(family)} for {stages} layers.")
    return lambda factor, stage: factor * family[stage]
