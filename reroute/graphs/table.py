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
        packed = np.empty(self.size, dtype=np.int64)
        ends = accumulate(map(prod, self.shapes.values()))
        pieces = np.split(packed, list(ends)[:-1])
        parts = {n: piece.reshape(shape) for piece, (n, shape) in zip(pieces, self.shapes.items(), strict=True)}
        self._place(plan, parts)
        self._count(plan, parts)
        return packed

    def _place(self, plan: Plan, parts: dict[str, Ints]) -> None:
        """Which row is which token, and where it lies."""
        length = self.shape_class.rows[0]
        row = np.arange(length)
        for name in ("inverse_index", "candidates", "text_rows"):
            parts[name].fill(-1)
        parts["positions"].fill(0)
        for b, (start, count) in enumerate(zip(self.starts, plan.lengths, strict=True)):
            logical = np.flatnonzero(plan.order[b] >= 0)
            last = max(count - 1, 0)
            sources = logical if count else np.zeros(1, dtype=np.int64)  # a sample may be all padding
            parts["rows"][b] = np.where(row < count, row + start, -1)
            parts["inverse_index"][start : start + count] = row[:count] + b * length
            parts["positions"][start : start + count] = logical
            parts["sources"][b] = sources[np.minimum(row, last)] + b * plan.length
            parts["beyond"][b] = np.maximum(row - last, 0)
            parts["candidates"][b, : len(plan.visual[b])] = plan.visual[b]
            parts["text_rows"][b, : len(plan.text_rows[b])] = plan.text_rows[b]
        parts["tokens"][:] = np.maximum(parts["inverse_index"], 0)

    def _count(self, plan: Plan, parts: dict[str, Ints]) -> None:
        """Counts of each decision; what a removal left lies in rows of the class's length."""
        for decision in plan.decisions[: self.shape_class.num_stages]:
            starts: Sequence[int] = self.starts
            if not decision.from_pool:
                starts = [b * self.shape_class.rows[decision.left_by + 1] for b in range(plan.batch)]
            _, kv_lens, *others = plan.counts(decision, self.starts)
            stage = decision.stage
            parts["counts"][stage] = starts, kv_lens, *others
            parts["queries"][stage] = np.add(starts, kv_lens) - 1
            parts["dropped"][stage] = np.subtract(plan.lengths, plan.active(stage))
