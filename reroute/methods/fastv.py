"""FastV: rank by the last prompt token's attention early on, then keep a fixed share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from ..checks import number, shown, whole
from ..core.schedule import Action, Rounding, Schedule
from ..core.solver import scale_layers, solve
from ..errors import RerouteError
from ..rankers import LastTokenAttention, Ranker
from ..rankers.base import check_ranker
from .base import Method

if TYPE_CHECKING:
    from typing import Self

__all__ = ["FastV"]


@dataclass(frozen=True)
class FastV(Method):
    """The same share at every decision.

    - ``remove``: one decision, before ``layer``.
    - ``route``: the same, and new decisions before layers 7, 15 and 23 of 32, scaled to the depth.

    ``layer`` is taken literally; None is layer 3, moved forward only in shallow models. ``ratio``,
    the share of the N visual tokens at each decision, averages 192 of 576 over 32 layers. ``ranker`` may be one's own.
    """

    name = "fastv"
    layers_of_32: ClassVar[tuple[int, ...]] = (3, 7, 15, 23)

    layer: int | None = None
    ratio: float = 0.2644
    rounding: Rounding = "floor"
    ranker: Ranker = field(default=LastTokenAttention(), kw_only=True)

    def __post_init__(self) -> None:
        """Check the types."""
        check_ranker(self.ranker)
        try:
            object.__setattr__(self, "layer", None if self.layer is None else whole(self.layer))
            object.__setattr__(self, "ratio", number(self.ratio))
        except (TypeError, ValueError, OverflowError):
            raise RerouteError(
                f"{type(self).__name__} takes the number of a layer and a ratio, such as layer=3, ratio=0.25; got "
                f"layer={shown(self.layer)}, ratio={shown(self.ratio)}."
            ) from None

    @classmethod
    def official(cls) -> Self:
        """FastV as its authors describe it: layer 1's attention decides which half leaves before layer 2.

        Meant for ``remove``.
        """
        return cls(layer=2, ratio=0.5, rounding="half_even", ranker=LastTokenAttention(layer_offset=-1))

    def schedule(self, num_layers: int, action: Action) -> Schedule:
        """See ``Method``."""
        layers = self._layers(num_layers, action)
        return Schedule(layers, (self.ratio,) * len(layers), (self.ranker,), self.rounding)

    def with_budget(self, keep: float, num_layers: int, action: Action) -> Self:
        """See ``Method``."""
        ratios = solve("uniform", self._layers(num_layers, action), num_layers, keep)
        return replace(self, ratio=ratios[0])

    def _layers(self, num_layers: int, action: Action) -> tuple[int, ...]:
        first, *later = scale_layers(self.layers_of_32, num_layers)
        first = first if self.layer is None else self.layer
        return (first, *(x for x in later if x > first)) if action == "route" else (first,)
