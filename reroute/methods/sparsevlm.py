"""SparseVLM: words that the picture speaks to rate it, at three depths; what is pruned is recycled."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..checks import check_name, finite, items, shown
from ..core.schedule import Action, PositionMode, Rounding, Schedule
from ..core.solver import scale_layers, scale_ratios
from ..errors import RerouteError
from ..rankers import Ranker, RaterAttention
from ..rankers.base import check_ranker
from .base import Method

if TYPE_CHECKING:
    from typing import Self

    from ..rankers.rater_attention import Version

__all__ = ["SparseVLM"]

_COUNTS: dict[str, dict[int, tuple[int, int, int]]] = {
    "1.5": {192: (309, 204, 113), 128: (312, 117, 39), 96: (249, 55, 27), 64: (82, 32, 18)},
    "2.0": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
"""Of 576 tokens, clusters included, by version and the number that each setting is named after."""


@dataclass(frozen=True)
class SparseVLM(Method):
    """Decisions by ``RaterAttention`` before layers 3, 7 and 16 of 32, scaled to the depth.

    - ``remove``: as published. Clusters of what is pruned go on in the place of some of the tokens that are kept, and
      are counted.
    - ``route``: as many tokens, and none are clustered: what is deferred is not lost.

    ``ratios`` has one per layer, relative to the N visual tokens; None is 309 : 204 : 113, which are the counts of 576
    on 32 layers. The published numbers of tokens leave clusters out, and count a layer by what it passes on: "192" runs
    206.5 tokens per layer. Counts by the rank of each prompt's attention, as in the first release, are not offered:
    the host would have to wait for them, and rows of a batch would differ.
    """

    name = "sparsevlm"

    ratios: tuple[float, ...] | None = None
    rounding: Rounding = "floor"
    position_mode: PositionMode = "preserved"
    ranker: Ranker = field(default=RaterAttention(), kw_only=True)

    def __post_init__(self) -> None:
        """Turn a sequence into a tuple and check its type."""
        check_ranker(self.ranker)
        try:
            if self.ratios is not None:
                object.__setattr__(self, "ratios", tuple(map(finite, items(self.ratios))))
        except (TypeError, ValueError, OverflowError):
            raise RerouteError(
                "SparseVLM takes a sequence of ratios, such as ratios=(0.5, 0.35, 0.2); got "
                f"ratios={shown(self.ratios)}."
            ) from None

    @classmethod
    def official(cls, tokens: int = 192, version: Version = "1.5") -> Self:
        """SparseVLM as its authors released it, by the tokens of 576 that a setting is named after: 192, 128, 96 or 64.

        Only for ``remove``. Version 1.5 renumbers what is left; ``"2.0"`` (SparseVLM+) does not.
        """
        check_name("version", version, _COUNTS)
        if tokens not in _COUNTS[version]:
            known = ", ".join(map(str, _COUNTS[version]))
            raise RerouteError(f"SparseVLM was released for {known} tokens, not for {shown(tokens)}: use keep=.")
        ratios = tuple(count / 576 for count in _COUNTS[version][tokens])
        positions: PositionMode = "renumbered" if version == "1.5" else "preserved"
        return cls(ratios, position_mode=positions, ranker=RaterAttention(version))

    def schedule(self, num_layers: int, action: Action) -> Schedule:
        """See ``Method``."""
        if self.ratios is None:
            return self.with_budget(206.5 / 576, num_layers, action).schedule(num_layers, action)
        layers = scale_layers((3, 7, 16), num_layers)
        return Schedule(layers, self.ratios, (self.ranker,), self.rounding, self.position_mode)

    def with_budget(self, keep: float, num_layers: int, action: Action) -> Self:
        """See ``Method``. The ratios stay in proportion."""
        layers = scale_layers((3, 7, 16), num_layers)
        proportions = _COUNTS["1.5"][192] if self.ratios is None else self.ratios
        return replace(self, ratios=scale_ratios(proportions[: len(layers)], layers, num_layers, keep))
