"""VScan: local and global tokens that take up the others, before the decoder; then a cut inside of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..checks import shown
from ..core.schedule import Action, PositionMode, Schedule
from ..errors import RerouteError
from ..rankers import LastTokenAttention, LocalGlobal, Ranker
from .two_stage import TwoStage

if TYPE_CHECKING:
    from typing import Self

__all__ = ["VScan"]


@dataclass(frozen=True)
class VScan(TwoStage):
    """Local and global tokens before layer 0 (``LocalGlobal``), and fewer of them from the middle of the decoder on.

    - ``remove``: as published, a second decision before layer 16 of 32.
    - ``route``: the first decision removes as published; among what it left decisions are made before layers 16, 20, 24
      and 28 of 32, each for as many as the one would keep: the same budget. With ``discards=False`` all visual tokens
      compete there.

    ``ratios`` are those of the first and of the later decisions, relative to the N visual tokens; None is 3 to 1, with
    a budget avg_T / N of 1/9: 96 and 32 of 576. ``layer`` is that of the second decision, taken literally. ``first``
    ranks the first decision, ``second`` the second one of ``remove``, ``ranker`` those of ``route``.
    """

    name = "vscan"
    proportions = (3, 1)

    position_mode: PositionMode = field(default="preserved", kw_only=True)
    first: Ranker = field(default=LocalGlobal(), kw_only=True)

    @classmethod
    def official(cls, average: float = 64) -> Self:
        """VScan as its authors released it, by the tokens of 576 or the share that it averages; meant for ``remove``.

        64 is the setting for LLaVA-1.5, which counts positions anew, only with ``remove``; 0.111 that for Qwen2.5-VL.
        """
        if average == 64:
            return cls((96 / 576, 32 / 576), position_mode="renumbered")
        if average == 0.111:
            second = LastTokenAttention(rotates=False)
            return cls((0.167, 0.167 * 0.333), rounding="nested_floor", second=second)
        raise RerouteError(
            f"VScan was released for the averages 64 and 0.111, not for {shown(average)}: use ratios= or keep=."
        )

    def schedule(self, num_layers: int, action: Action) -> Schedule:
        """See ``Method``."""
        return replace(super().schedule(num_layers, action), position_mode=self.position_mode)
