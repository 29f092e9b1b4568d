"""DART: a few pivots, and the visual tokens that least duplicate them, chosen once early on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from ..rankers import Duplication, Ranker
from .fastv import FastV

if TYPE_CHECKING:
    from typing import Self

__all__ = ["DART"]


@dataclass(frozen=True)
class DART(FastV):
    """FastV's schedule, ranked by ``Duplication`` of pivots.

    - ``remove``: one decision, before ``layer``: as published.
    - ``route``: the same, and new decisions, by new pivots, before layers 7, 15 and 23 of 32, scaled to the depth.

    ``layer`` None is layer 2, moved forward only in shallow models. ``ratio`` is that of 132 of 576 tokens.
    """

    name = "dart"
    layers_of_32: ClassVar[tuple[int, ...]] = (2, 7, 15, 23)

    ratio: float = 132 / 576
    ranker: Ranker = field(default=Duplication(), kw_only=True)

    @classmethod
    def official(cls, budget: int = 128) -> Self:
        """DART as its authors released it, by the tokens of 576 that it is named after; meant for ``remove``.

        Four visual pivots come on top of them, and each of eight pivots picks an eighth of the budget, rounded down.
        """
        return cls(layer=2, ratio=(4 + budget // 8 * 8) / 576)
