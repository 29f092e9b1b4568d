"""Nüwa: anchors that take up what is around them, before the decoder; then one cut by attention inside of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..checks import shown
from ..errors import RerouteError
from ..rankers import LastRowsAttention, LastTokenAttention, Ranker, RegionAnchors
from .two_stage import TwoStage

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Nuwa"]

_LLAVA = {64: (112, 16), 128: (224, 32), 192: (336, 48)}
"""Of 576 tokens, by the average over 32 layers."""
_QWEN = {0.25: (0.35, 0.42, 3), 0.5: (0.6, 0.66, 3), 0.75: (0.85, 0.7, 4)}
"""Share of the tokens, share of those, anchors of a region; by the average ratio."""


@dataclass(frozen=True)
class Nuwa(TwoStage):
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
    proportions = (7, 1)

    first: Ranker = field(default=RegionAnchors(), kw_only=True)
    second: Ranker = field(default=LastTokenAttention(layer_offset=-1), kw_only=True)

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
