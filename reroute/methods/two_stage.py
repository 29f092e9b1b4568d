"""Methods of two stages: a cut at the vision encoder, and one by attention in the middle of the decoder."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from ..checks import items, number, shown, whole
from ..core.schedule import Action, Rounding, Schedule
from ..core.solver import scale_ratios
from ..errors import RerouteError
from ..rankers import LastTokenAttention, Ranker
from ..rankers.base import check_ranker
from .base import Method

if TYPE_CHECKING:
    from typing import Self

__all__ = ["TwoStage"]


@dataclass(frozen=True)
class TwoStage(Method):
    """Base of methods that decide before layer 0, and then fewer tokens are kept from the middle of the decoder on.

    - ``remove``: a second decision before layer 16 of 32.
    - ``route``: the first decision removes; among what it left decisions are made before layers 16, 20, 24 and 28 of
      32, each for as many as the one would keep: the same budget. With ``discards=False`` all visual tokens compete
      there.

    ``ratios`` are those of the first and of the later decisions, relative to the N visual tokens; None is in
    ``proportions``, with a budget avg_T / N of 1/9. ``layer`` is that of the second decision, taken literally.
    ``first`` ranks the first decision, ``second`` the second one of ``remove``, ``ranker`` those of ``route``.
    """

    proportions: ClassVar[tuple[float, float]]

    ratios: tuple[float, float] | None = None
    layer: int | None = None
    rounding: Rounding = "floor"
    discards: bool = True
    first: Ranker = field(kw_only=True)
    second: Ranker = field(default=LastTokenAttention(), kw_only=True)
    ranker: Ranker = field(default=LastTokenAttention(), kw_only=True)

    def __post_init__(self) -> None:
        """Check the types; a schedule checks the rest."""
        for ranker in (self.first, self.second, self.ranker):
            check_ranker(ranker)
        try:
            if self.ratios is not None:
                first, later = map(number, items(self.ratios))
                object.__setattr__(self, "ratios", (first, later))
            object.__setattr__(self, "layer", None if self.layer is None else whole(self.layer))
        except (TypeError, ValueError, OverflowError):
            raise RerouteError(
                f"{type(self).__name__} takes two ratios and the number of a layer, such as ratios=(0.2, 0.03), "
                f"layer=16; got ratios={shown(self.ratios)}, layer={shown(self.layer)}."
            ) from None
        if not isinstance(self.discards, bool):
            raise RerouteError(f"discards is True or False, not {shown(self.discards)}.")

    def schedule(self, num_layers: int, action: Action) -> Schedule:
        """See ``Method``."""
        if self.ratios is None:
            return self.with_budget(1 / 9, num_layers, action).schedule(num_layers, action)
        first, later = self.ratios
        layer = self._second_layer(num_layers)
        if action == "remove":
            return Schedule((0, layer), (first, later), (self.first, self.second), self.rounding)
        layers = sorted({layer + quarter * (num_layers - layer) // 4 for quarter in range(4)})
        actions: list[Action] = ["remove" if self.discards else "route", *(action for _ in layers)]
        return Schedule(
            (0, *layers),
            (first, *[later] * len(layers)),
            (self.first, *[self.ranker] * len(layers)),
            self.rounding,
            actions=tuple(actions),
        )

    def with_budget(self, keep: float, num_layers: int, action: Action) -> Self:
        """See ``Method``. The two ratios stay in proportion."""
        proportions = self.proportions if self.ratios is None else self.ratios
        first, later = scale_ratios(proportions, (0, self._second_layer(num_layers)), num_layers, keep)
        return replace(self, ratios=(first, later))

    def _second_layer(self, num_layers: int) -> int:
        return max(1, num_layers // 2) if self.layer is None else self.layer
