"""Which ratios meet a budget ``keep`` = avg_T / N: the mean over *all* layers of the share that runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

from ..checks import check_name, number, shown
from ..errors import RerouteError
from .schedule import Schedule, tidy

__all__ = ["RatioFamily", "budget_of", "check_keep", "scale_layers", "scale_ratios", "solve"]

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


def solve(family: RatioFamily, layers: Sequence[int], num_layers: int, keep: float) -> tuple[float, ...]:
    """Ratios of a family, one per routing layer, for the budget ``keep`` = avg_T / N.

    The average is that of the ratios themselves, clipped to 1; rounding down to counts takes less
    than one token off it. ``keep=1`` gives exactly 1.0 everywhere.

    Raises:
        RerouteError: unknown family, layers that do not fit, or a budget that no ratios reach.
    """
    check_name("ratio family", family, _RATIO)
    Schedule(tuple(layers), (1.0,) * len(layers)).validate(num_layers, "route")
    keep = check_keep(keep)
    if keep == 1:
        return (1.0,) * len(layers)

    def ratios(free: float) -> tuple[float, ...]:
        return tuple(min(1.0, _RATIO[family](free, stage)) for stage in range(len(layers)))

    return ratios(tidy(_smallest(ratios, 2.0 ** len(layers), layers, num_layers, keep)))


def scale_ratios(ratios: Sequence[float], layers: Sequence[int], num_layers: int, keep: float) -> tuple[float, ...]:
    """``ratios`` times one factor, clipped to 1, for the budget ``keep`` = avg_T / N; see ``solve``.

    Raises:
        RerouteError: no factor reaches the budget, or the layers before the first decision alone exceed it.
    """
    keep, highest = check_keep(keep), max(ratios, default=0.0)

    def scaled(factor: float) -> tuple[float, ...]:
        return tuple(min(1.0, factor * ratio) for ratio in ratios)

    least = min((ratio for ratio in ratios if ratio > 0), default=0.0)
    if not highest or budget_of(layers, [float(ratio > 0) for ratio in ratios], num_layers) < keep:
        raise RerouteError(
            f"keep = {keep} is out of reach of the ratios {tuple(ratios)}: stages that keep nothing stay as they are. "
            "Choose a smaller keep or let more stages keep something."
        )
    if keep == 1:
        return (1.0,) * len(ratios)
    return tuple(map(tidy, scaled(_smallest(scaled, 1 / least, layers, num_layers, keep))))


def budget_of(layers: Sequence[int], ratios: Sequence[float], num_layers: int) -> float:
    """The budget ``keep`` = avg_T / N of a schedule on ``num_layers`` layers, before rounding to counts."""
    widths = (end - start for start, end in pairwise((*layers, num_layers)))
    return (layers[0] + sum(width * ratio for width, ratio in zip(widths, ratios, strict=True))) / num_layers


def _smallest(
    ratios: Callable[[float], tuple[float, ...]], high: float, layers: Sequence[int], num_layers: int, keep: float
) -> float:
    """The smallest parameter up to ``high`` whose ``ratios``, which grow with it, reach the budget ``keep``."""
    target = keep * num_layers - layers[0]
    if target <= 0:
        raise RerouteError(
            f"keep = {keep} is out of reach: layers before the first routing layer run all visual "
            f"tokens, so with routing from layer {layers[0]} on, {num_layers} layers cannot get down "
            f"to {layers[0]}/{num_layers} = {layers[0] / num_layers:.4g}. "
            "Choose a larger keep or an earlier first routing layer."
        )
    widths = [end - start for start, end in pairwise((*layers, num_layers))]
    low = 0.0
    while low < (middle := (low + high) / 2) < high:
        if sum(w * r for w, r in zip(widths, ratios(middle), strict=True)) < target:
            low = middle
        else:
            high = middle
    return high
