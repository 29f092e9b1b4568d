"""What a method is: a name for schedules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, is_dataclass
from inspect import get_annotations
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from typing import Self

    from ..core.schedule import Action, Schedule

__all__ = ["Method"]


@dataclass(frozen=True)
class Method(ABC):
    """A name for schedules: before which layers decisions are made, how many tokens they keep, ranked by what."""

    name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse ``ranker = …`` without an annotation, which a dataclass would ignore."""
        super().__init_subclass__(**kwargs)
        settings = {field.name for base in cls.__bases__ if is_dataclass(base) for field in fields(base)}
        for name in settings & vars(cls).keys() - get_annotations(cls).keys():
            raise TypeError(f"{cls.__name__}.{name} is a field of a dataclass: write '{name}: … = …'")

    @abstractmethod
    def schedule(self, num_layers: int, action: Action) -> Schedule:
        """The schedule for a model of ``num_layers`` decoder layers."""

    @abstractmethod
    def with_budget(self, keep: float, num_layers: int, action: Action) -> Self:
        """This method with the ratios that give ``keep`` = avg_T / N, before rounding to counts.

        Raises:
            RerouteError: no ratios reach this budget; says which ones can be reached.
        """
