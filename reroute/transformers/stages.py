"""What the layers of a stage have in common while a prefill runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from .cache import Room, RoutedLayer, RowPositions
from .forward import Kwargs

__all__ = ["Held", "Stage"]


@dataclass(frozen=True)
class Stage:
    """What layers of one stage get, if they hold the same earlier rows and the decoder gives them the same.

    - ``given``: what that is, mask and tables, if it has any.
    - ``kwargs``: the same, adapted to the rows that run.
    - ``stored``: rows that the cache was given afterwards, of which ``rows`` need not list the last ones.
    """

    given: tuple[Any, Any]
    kwargs: Kwargs
    stored: int
    rows: RowPositions


class Held(NamedTuple):
    """What a layer of the cache has before a stage stores in it.

    - ``layer``, if it lacks rows; it gives the last ``visible`` of its rows.
    - ``room``: of a static cache, if it gives what is empty yet, too: that is hidden as what comes later.
    """

    layer: RoutedLayer | None
    visible: int
    room: Room | None
