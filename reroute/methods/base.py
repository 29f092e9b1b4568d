"""What a method is: a name for a policy of schedules and a ranker."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from inspect import get_annotations
from typing import TYPE_CHECKING, Any, ClassVar

from ..rankers import LastTokenAttention, Ranker

if TYPE_CHECKING:
    from typing import Self

    from ..core.schedule import Action, Schedule

__all__ = ["Method"]


@dataclass(frozen=True)
class Method(ABC):
    """When decisions are made and how many visual tokens they keep, and what ranks them.

    ``ranker`` of any method can be replaced: ``FastV(ranker=Norm())``, see ``reroute.rankers.ScoreRanker``.
    """

    name: ClassVar[str]

    ranker: Ranker = field(default=LastTokenAttention(), kw_only=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse ``ranker = …`` without an annotation, which a dataclass would ignore."""
        super().__init_subclass__(**kwargs)
        if "ranker" in vars(cls) and "ranker" not in get_annotations(cls):
            raise TypeError(f"{cls.__name__}.ranker is a field of a dataclass: write 'ranker: Ranker = …'")

    @abstractmethod
    def schedule(self, num_layers: int, action: Action) -> Schedule:
        """The schedule for a model of ``num_layers`` decoder layers."""

    @abstractmethod
    def with_budget(self, keep: float, num_layers: int, action: Action) -> Self:
        """This method with the ratios that give ``keep`` = avg_T / N, before rounding to counts.

        Raises:
            RerouteError: no ratios reach this budget; says which ones can be reached.
        """
