"""Nüwa: anchors that take up what is around them, before the decoder; then one cut by attention inside of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..checks import items, number, shown, whole
from ..core.schedule import Action, Rounding, Schedule
from ..core.solver import scale_ratios
from ..errors import RerouteError
from ..rankers import LastRowsAttention, LastTokenAttention, Ranker, RegionAnchors
from ..rankers.base import check_ranker
from .base import Method

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Nuwa"]

_LLAVA = {64: (112, 16), 128: (224, 32), 192: (336, 48)}
"""Of 576 tokens, by the average over 32 layers."""
_QWEN = {0.25: (0.35, 0.42, 3), 0.5: (0.6, 0.66, 3), 0.75: (0.85, 0.7, 4)}
"""Share of the tokens, share of those, anchors of a region; by the average ratio."""


@dataclass(frozen=True)
class Nuwa(Method):
    """Anchors before layer 0 (``RegionAnchors``), and fewer of them from the middle of the decoder on.

    - ``remove``: as published, a second decision before layer 16 of 32.
    - ``route``: other tokens than the anchors are removed as published; among the anchors decisions are made before
      layers 16, 20, 24 and 28 of 32, each for as many as the one would keep: the same budget. With ``discards=False``
      all visual tokens compete there.

    ``ratios`` are those of the anchors and of the later decisions, relative to the N visual tokens; None is 7 to 1,
    with a budget avg_T / N of 1/9. ``layer`` is that of the second decision, taken literally. ``first`` ranks the first
    decision, ``second`` the second one of ``remove``, ``ranker`` those of ``route``.
    """

    name = "nuwa"

    ratios: tuple[float, float] | None = None
    layer: int | None = None
    rounding: Rounding = "floor"
    discards: bool = True
    first: Ranker = field(default=RegionAnchors(), kw_only=True)
    second: Ranker = field(default=LastTokenAttention(layer_offset=-1), kw_only=True)
    ranker: Ranker = field(default=LastTokenAttention(), kw_only=True)

    def __post_init__(self) -> None:
        """Check the types; a schedule checks the rest."""
        for ranker in (self.first, self.second, self.ranker):
            check_ranker(ranker)
        try:
            if self.ratios is not None:
                anchors, later = map(number, items(self.ratios))
                object.__setattr__(self, "ratios", (anchors, later))
            object.__setattr__(self, "layer", None if self.layer is None else whole(self.layer))
        except (TypeError, ValueError, OverflowError):
            raise RerouteError(
                "Nuwa takes two ratios and the number of a layer, such as ratios=(0.2, 0.03), layer=16; got "
                f"ratios={shown(self.ratios)}, layer={shown(self.layer)}."
            ) from None
        if not isinstance(self.discards, bool):
            raise RerouteError(f"discards is True or False, not {shown(self.discards)}.")

    @classmethod
    def official(cls, average: float = 64) -> Self:
        """Nüwa as its authors released it, by the tokens of 576 or the share that it averages; meant for ``remove``.

        64, 128 or 192 are the settings for LLaVA-1.5; 0.25, 0.5 or 0.75 those for Qwen2.5-VL.
        """
        if average in _LLAVA:
            anchors, later = _LLAVA[int(average)]
            return cls((anchors / 576, later / 576))
        if average in _QWEN:
            share, of_these, per_region = _QWEN[average]
            second = LastRowsAttention(layer_offset=-1)
            return cls(
                (share, share * of_these), 15, "nested", first=RegionAnchors(per_region=per_region), second=second
            )
        known = ", ".join(map(str, (*_LLAVA, *_QWEN)))
        raise RerouteError(
            f"Nüwa was released for the averages {known}, not for {shown(average)}: use ratios= or keep=."
        )

    def schedule(self, num_layers: int, action: Action) -> Schedule:
        """See ``Method``."""
        if self.ratios is None:
            return self.with_budget(1 / 9, num_layers, action).schedule(num_layers, action)
        anchors, later = self.ratios
        layer = self._second_layer(num_layers)
        if action == "remove":
            return Schedule((0, layer), (anchors, later), (self.first, self.second), self.rounding)
        layers = sorted({layer + quarter * (num_layers - layer) // 4 for quarter in range(4)})
        actions: list[Action] = ["remove" if self.discards else "route", *(action for _ in layers)]
        return Schedule(
            (0, *layers),
            (anchors, *[later] * len(layers)),
            (self.first, *[self.ranker] * len(layers)),
            self.rounding,
            actions=tuple(actions),
        )

    def with_budget(self, keep: float, num_layers: int, action: Action) -> Self:
        """See ``Method``. The two ratios stay in proportion."""
        proportions = (7.0, 1.0) if self.ratios is None else self.ratios
        anchors, later = scale_ratios(proportions, (0, self._second_layer(num_layers)), num_layers, keep)
        return replace(self, ratios=(anchors, later))

    def _second_layer(self, num_layers: int) -> int:
        return max(1, num_layers // 2) if self.layer is None else self.layer
