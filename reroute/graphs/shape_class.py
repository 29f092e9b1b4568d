"""The shapes that a graph has baked in."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.plan import Plan

__all__ = ["TILE", "ShapeClass", "needed_rows"]

TILE = 64
"""Rows are rounded up to this many: matrix products compute whole tiles in any case."""


@dataclass(frozen=True)
class ShapeClass:
    """What prompts have in common that one graph serves, under one schedule.

    - ``batch``: number of samples B.
    - ``rows``: compact length of the dense layers, and then of each stage. It is a capacity: of rows, and so of visual
      and of text tokens too.
    """

    batch: int
    rows: tuple[int, ...]

    @property
    def num_stages(self) -> int:
        """Decisions that the graph makes; none where every visual token is kept."""
        return len(self.rows) - 1

    @classmethod
    def of(cls, plan: Plan) -> ShapeClass:
        """The smallest class of ``plan``. Padding of the prompts has no row in it."""
        return cls(plan.batch, tuple(-(-rows // TILE) * TILE for rows in needed_rows(plan)))

    def dominates(self, other: ShapeClass) -> bool:
        """Whether a graph of this class may serve every prompt of ``other``."""
        return (
            self.batch == other.batch
            and len(self.rows) == len(other.rows)
            and all(mine >= its for mine, its in zip(self.rows, other.rows, strict=True))
        )


def needed_rows(plan: Plan) -> tuple[int, ...]:
    """Rows of the longest sample in the dense layers, and in each stage, if the plan changes anything."""
    num_stages = 0 if plan.changes_nothing else len(plan.decisions)
    return tuple(max(plan.active(stage)) for stage in range(-1, num_stages))
