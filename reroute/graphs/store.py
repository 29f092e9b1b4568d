"""The graphs of one model: which one serves a prompt, which classes are captured, which graph leaves."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

from ..core.cost import ModelShape
from ..core.schedule import Schedule
from .settings import Graphs
from .shape_class import ShapeClass
from .waste import Roofline

__all__ = ["GraphStore"]

Graph = TypeVar("Graph")

MOST_SEEN = 4096
"""Classes of which it is known that a prompt came, and rows of which the modelled time is."""


class GraphStore(Generic[Graph]):
    """Graphs by key and class. A key is what a graph has baked in beside its class; they serve prompts of their key.

    Its caller has the turn of the graphs' device.
    """

    def __init__(self, graphs: Graphs, shape: ModelShape) -> None:
        """Empty."""
        self._graphs, self.shape, self._roofline = graphs, shape, Roofline()
        self._held: OrderedDict[tuple[Hashable, ShapeClass], Graph] = OrderedDict()
        self._known: dict[tuple[tuple[int, ...], int, tuple[int, ...]], float] = {}
        self._seen: OrderedDict[tuple[Hashable, ShapeClass], str] = OrderedDict()

    def __len__(self) -> int:
        """How many graphs are held."""
        return len(self._held)

    def let_go(self) -> None:
        """Of all graphs. Their classes have been seen: the next prompt of one is captured."""
        self._held.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()
        self._seen.clear()

    def best(self, key: Hashable, own: ShapeClass, schedule: Schedule, needed: Sequence[int]) -> Graph | None:
        """The graph that serves prompts of class ``own``, which need ``needed`` rows, in the least modelled time.

        None if there is none that wastes as little as it must.
        """
        fitting = [its for of, its in self._held if of == key and its.dominates(own)]
        if not fitting:
            return None
        cheapest = min(fitting, key=lambda its: self._seconds(its.rows, its.batch, schedule))
        if self._share(cheapest, schedule, needed) > self._graphs.max_waste:
            return None
        self._held.move_to_end((key, cheapest))
        return self._held[key, cheapest]

    def why_not(
        self, key: Hashable, own: ShapeClass, schedule: Schedule, needed: Sequence[int], *, at_once: bool = False
    ) -> str:
        """Why no graph of class ``own`` shall be captured for a prompt of it; empty if one shall.

        ``at_once``: for the first prompt already.
        """
        share = self._share(own, schedule, needed)
        if share > self._graphs.max_waste:
            return (
                f"fillers would add {share:.1%} to its modelled time in a graph, and max_waste is "
                f"{self._graphs.max_waste:.1%}"
            )
        known = self._seen.get((key, own))
        self.note(key, own, known or "")
        if known is None and not at_once:
            return f"no graph serves it yet, and it is the first prompt of its class {own.rows}"
        return known or ""

    def note(self, key: Hashable, own: ShapeClass, why: str) -> None:
        """A prompt of class ``own`` came. ``why`` it cannot be captured, or nothing."""
        self._seen[key, own] = why
        self._seen.move_to_end((key, own))
        if len(self._seen) > MOST_SEEN:
            self._seen.popitem(last=False)

    def put(self, key: Hashable, own: ShapeClass, graph: Graph) -> None:
        """Hold ``graph``, and let go of the one that was not used for longest if there are too many."""
        self._held[key, own] = graph
        if len(self._held) > self._graphs.max_graphs:
            self._held.popitem(last=False)

    def _share(self, shape_class: ShapeClass, schedule: Schedule, needed: Sequence[int]) -> float:
        """Of modelled time that fillers add."""
        least = self._seconds(tuple(needed), shape_class.batch, schedule)
        return self._seconds(shape_class.rows, shape_class.batch, schedule) / least - 1

    def _seconds(self, rows: tuple[int, ...], batch: int, schedule: Schedule) -> float:
        key = rows, batch, schedule.layers
        if key not in self._known:
            if len(self._known) >= MOST_SEEN:
                self._known.clear()
            self._known[key] = self._roofline.prefill_seconds(self.shape, schedule, rows, batch)
        return self._known[key]
