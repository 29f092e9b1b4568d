"""All integers of a prompt in the shapes of a class: what is uploaded before a graph is replayed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..core.plan import Plan
from .shape_class import ShapeClass

if TYPE_CHECKING:
    from ..core.plan import Ints

__all__ = ["PromptTable"]


@dataclass(frozen=True)
class PromptTable:
    """The layout of one int64 array that holds everything a prompt of a class can differ in.

    It follows from the class and from where its samples lie in the pool alone, so every tensor of a graph is a view of
    the same memory for every prompt. L is the class's dense length, R the number of pool rows; of the rows of a sample
    the real ones come first.

    - ``rows`` (B, L): pool row of each row, -1 for fillers.
    - ``tokens`` (R,): flat index ``b * L + row`` of each pool row; 0 where there is none, which ``inverse_index`` (R,)
      marks with -1.
    - ``positions`` (R,): logical position, padding counted, of each pool row.
    - ``candidates``, ``text_rows`` (B, L): sample rows, ascending, then -1.
    - ``counts`` (stages, 5, B): of each decision, as ``reroute_kernels.SelectMetadata`` has them on the device.
    - ``queries`` (stages, B): the query's row among those that are scored.
    - ``dropped`` (stages, B): how many of a sample's rows do not run in that stage.
    - ``sources`` (B, L): flat index, in the caller's tensors with L' columns, ``b * L' + position``, of what each row
      is made of: its token, and for fillers, which have to be finite, the last token again.
    - ``beyond`` (B, L): by how much a row's position ids exceed those of its source: 0, and for fillers 1, 2, 3, ….
    """

    shape_class: ShapeClass
    starts: tuple[int, ...]
    num_rows: int

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parts, in their order."""
        batch, length, stages = self.shape_class.batch, self.shape_class.rows[0], self.shape_class.num_stages
        per_row, per_pool_row, per_decision = (batch, length), (self.num_rows,), (stages, batch)
        return {
            "rows": per_row,
            "tokens": per_pool_row,
            "inverse_index": per_pool_row,
            "positions": per_pool_row,
            "candidates": per_row,
            "text_rows": per_row,
            "counts": (stages, 5, batch),
            "queries": per_decision,
            "dropped": per_decision,
            "sources": per_row,
            "beyond": per_row,
        }

    @cached_property
    def size(self) -> int:
        """Integers of the whole array."""
        return sum(map(prod, self.shapes.values()))

    @cached_property
    def _places(self) -> list[tuple[str, tuple[int, ...], int, int]]:
        """Name and shape of each part, and where it begins and ends."""
        ends = list(accumulate(map(prod, self.shapes.values())))
        return list(zip(self.shapes, self.shapes.values(), [0, *ends], ends, strict=False))

    @cached_property
    def _row(self) -> Ints:
        """0, 1, 2, …, L - 1."""
        return np.arange(self.shape_class.rows[0])

    def views(self, packed: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of the array (``size``,), without a copy."""
        pieces = packed.split([prod(shape) for shape in self.shapes.values()])
        return {name: piece.view(shape) for piece, (name, shape) in zip(pieces, self.shapes.items(), strict=True)}

    def packed(self, plan: Plan) -> Ints:
        """The array (``size``,) of the prompts of ``plan``.

        Raises:
            ValueError: they are not of a class that this one dominates.
        """
        own = ShapeClass.of(plan)
        if not self.shape_class.dominates(own):
            raise ValueError(f"a graph of {self.shape_class} cannot serve prompts of {own}")
        packed = np.full(self.size, -1, dtype=np.int64)
        parts = {name: packed[begin:end].reshape(shape) for name, shape, begin, end in self._places}
        self._place(plan, parts)
        self._count(plan, parts)
        return packed

    def _place(self, plan: Plan, parts: dict[str, Ints]) -> None:
        """Which row is which token, and where it lies. All is -1 before."""
        row, length = self._row, len(self._row)
        parts["positions"].fill(0)
        for b, (start, count) in enumerate(zip(self.starts, plan.lengths, strict=True)):
            order, last = plan.order[b], max(count - 1, 0)  # a sample may be all padding
            logical = row[:count] if count == len(order) else np.flatnonzero(order >= 0)
            sources, beyond = parts["sources"][b], parts["beyond"][b]
            sources[:count] = logical
            sources[last:] = logical[-1] if count else 0
            sources += b * plan.length
            beyond[:last], beyond[last:] = 0, row[: length - last]
            parts["rows"][b, :count] = row[:count] + start
            parts["inverse_index"][start : start + count] = row[:count] + b * length
            parts["positions"][start : start + count] = logical
            parts["candidates"][b, : len(plan.visual[b])] = plan.visual[b]
            parts["text_rows"][b, : len(plan.text_rows[b])] = plan.text_rows[b]
        np.maximum(parts["inverse_index"], 0, out=parts["tokens"])

    def _count(self, plan: Plan, parts: dict[str, Ints]) -> None:
        """Counts of each decision; what a removal left lies in rows of the class's length."""
        decisions = plan.decisions[: self.shape_class.num_stages]
        if not decisions:
            return
        counts = []
        for decision in decisions:
            starts: Sequence[int] = self.starts
            if not decision.from_pool:
                starts = [b * self.shape_class.rows[decision.left_by + 1] for b in range(plan.batch)]
            _, *others = plan.counts(decision, self.starts)
            counts.append((starts, *others))
        packed = parts["counts"]
        packed[:] = counts
        np.add(packed[:, 0], packed[:, 1] - 1, out=parts["queries"])
        active = [plan.active(decision.stage) for decision in decisions]
        np.subtract(plan.lengths, active, out=parts["dropped"])
