"""PDrop (PyramidDrop): rank again at several depths and keep fewer visual tokens each time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import floor
from typing import TYPE_CHECKING

from ..checks import finite, items, shown
from ..core.schedule import Action, PositionMode, Rounding, Schedule
from ..core.solver import RatioFamily, scale_layers, solve
from ..errors import RerouteError
from ..rankers import LastTokenAttention, Ranker
from ..rankers.base import check_ranker
from .base import Method

if TYPE_CHECKING:
    from typing import Self

__all__ = ["PDrop"]


@dataclass(frozen=True)
class PDrop(Method):
    """A share that falls from stage to stage.

    - ``remove``: r, r², r³, r⁴.
    - ``route``: a, a, a/2, a/4: the first two stages see different tokens, not fewer.

    ``layers`` are routing layers, or where below 1 shares of the depth; None is (2, 7, 15, 23) of
    32, scaled to the depth. ``ratios`` has one per layer, relative to the N visual tokens; None
    is those whose budget avg_T / N is 1/3: on 32 layers the ones released for 192 of 576 tokens. ``ranker`` may
    be one's own.
    """

    name = "pdrop"

    layers: tuple[float, ...] | None = None
    ratios: tuple[float, ...] | None = None
    rounding: Rounding = "floor"
    position_mode: PositionMode = "preserved"
    ranker: Ranker = field(default=LastTokenAttention(), kw_only=True)

    def __post_init__(self) -> None:
        """Turn sequences into tuples and check their types."""
        check_ranker(self.ranker)
        try:
            for name in ("layers", "ratios"):
                if (given := getattr(self, name)) is not None:
                    object.__setattr__(self, name, tuple(map(finite, items(given))))
        except (TypeError, ValueError, OverflowError):
            raise RerouteError(
                "PDrop takes a sequence of layers and a sequence of ratios, such as layers=(2, 7), ratios=(0.5, 0.25); "
                f"got layers={shown(self.layers)}, ratios={shown(self.ratios)}."
            ) from None

    @classmethod
    def official(cls) -> Self:
        """PDrop as its authors released it: half leave at each quarter of the depth, the rest are renumbered.

        Only for ``remove``.
        """
        return cls((0.25, 0.5, 0.75), (0.5, 0.25, 0.125), "floor0", "renumbered")

    def schedule(self, num_layers: int, action: Action) -> Schedule:
        """See ``Method``."""
        if self.ratios is None:
            return self.with_budget(1 / 3, num_layers, action).schedule(num_layers, action)
        return Schedule(self._layers(num_layers), self.ratios, (self.ranker,), self.rounding, self.position_mode)

    def with_budget(self, keep: float, num_layers: int, action: Action) -> Self:
        """See ``Method``."""
        family: RatioFamily = "pyramid" if action == "route" else "geometric"
        return replace(self, ratios=solve(family, self._layers(num_layers), num_layers, keep))

    def _layers(self, num_layers: int) -> tuple[int, ...]:
        if self.layers is None:
            return scale_layers((2, 7, 15, 23), num_layers)
        return tuple(floor(x * num_layers if x < 1 else x) for x in self.layers)
