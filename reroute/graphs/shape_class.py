"""The shapes that a graph has baked in."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.plan import Plan

__all__ = ["TILE", "ShapeClass", "in_tiles", "needed_rows"]

TILE = 64
"""Rows of a matrix product, which computes whole tiles in any case."""
LEAST = 8
"""Rows that a class counts by at least: whatever they hold, each sample then begins at a multiple of 16 bytes."""
TENTH = 10
"""A sample is filled up by less than a tenth where its batch lets it; that is what ``max_waste`` is by default."""


def in_tiles(rows: int, batch: int) -> int:
    """Rows of a class in which each of ``batch`` samples needs ``rows``.

    Products see the rows of all samples together. So few rows are rounded up to a part of a tile, if the batch as a
    whole still is whole tiles or nearly so; many rows are rounded up to a tile each, as fewer classes are then made.
    """
    tile = TILE
    while tile > max(LEAST, TILE // batch) and tile * TENTH > rows:
        tile //= 2
    return -(-rows // tile) * tile


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

    @property
    def home_rows(self) -> int:
        """Rows in which all dense rows lie, one sample after the other, in whole pages."""
        return -(-self.batch * self.rows[0] // TILE) * TILE

    @classmethod
    def of(cls, plan: Plan) -> ShapeClass:
        """The smallest class of ``plan``. Padding of the prompts has no row in it."""
        return cls(plan.batch, tuple(in_tiles(rows, plan.batch) for rows in needed_rows(plan)))

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
