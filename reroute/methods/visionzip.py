"""VisionZip: what the vision tower attends to, and a few tokens for the rest, chosen once before the decoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from ..checks import shown
from ..core.schedule import Action
from ..errors import RerouteError
from ..rankers import DominantContextual, Ranker
from .diverse import Diverse

if TYPE_CHECKING:
    from typing import Self

__all__ = ["VisionZip"]


@dataclass(frozen=True)
class VisionZip(Diverse):
    """Dominant and contextual tokens before layer 0 (``DominantContextual``); for towers with a CLS row.

    - ``remove``: that decision alone, as published; a ninth is kept unless ``ratios`` or a budget says otherwise.
    - ``route``: later decisions by attention, as ``Diverse`` makes them.
    """

    name = "visionzip"
    layers: ClassVar[dict[Action, tuple[int, ...]]] = {**Diverse.layers, "remove": (0,)}
    proportions: ClassVar[dict[Action, tuple[float, ...]]] = {**Diverse.proportions, "remove": (1,)}
    usual_keep: ClassVar[float] = 1 / 9

    first: Ranker = field(default=DominantContextual(), kw_only=True)

    @classmethod
    def official(cls, tokens: int = 64) -> Self:
        """VisionZip as its authors released it for LLaVA-1.5: 64, 128 or 192 of 576 tokens, CLS among them.

        Dominant ones come first, and positions are counted anew. Only for ``remove``.
        """
        if tokens not in (64, 128, 192):
            raise RerouteError(
                f"VisionZip was released for 64, 128 and 192 tokens, not for {shown(tokens)}: use ratios= or keep=."
            )
        return cls((tokens / 576,), position_mode="renumbered", first=DominantContextual(as_released=True))
