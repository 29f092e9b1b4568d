"""The memory of a pool: slabs of pages, and what one lease has of a slab."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .streams import Mark, mark


@dataclass(eq=False)
class Slab:
    """One tensor of pages, its free page ids (ascending), and for each page the mark of its last use."""

    memory: Tensor
    free: list[int]
    marks: list[Mark | None]

    @property
    def pages(self) -> int:
        """How many there are."""
        return self.memory.shape[0]

    def run(self, count: int) -> int | None:
        """Where in ``free`` the first run of ``count`` consecutive pages begins."""
        free = self.free
        starts = range(len(free) - count + 1 if count else 0)
        return next((i for i in starts if free[i + count - 1] - free[i] == count - 1), None)

    def take(self, count: int) -> list[int]:
        """Ids of ``count`` pages that were free, consecutive ones if there are."""
        first = self.run(count) or 0
        taken = self.free[first : first + count]
        del self.free[first : first + count]
        return taken

    def give_back(self, pages: Sequence[int]) -> None:
        """Make ``pages`` free."""
        self.free.extend(pages)
        self.free.sort()

    def marks_of(self, pages: Sequence[int]) -> set[Mark | None]:
        """Those of the last uses of ``pages``."""
        ids = span(pages)
        return set(map(self.marks.__getitem__, pages) if ids is None else self.marks[ids])

    def mark(self, pages: Sequence[int], mark: Mark) -> None:
        """Note the last use of ``pages``."""
        ids = span(pages)
        if ids is not None:
            self.marks[ids] = [mark] * len(pages)
        else:
            for page in pages:
                self.marks[page] = mark


@dataclass(eq=False)
class Holding:
    """What a lease has of a slab and the pool gets back: pages, and the CUDA stream that uses them now."""

    slab: Slab
    page_ids: Sequence[int]
    stream: torch.cuda.Stream | None = None
    is_returned: bool = False

    def end_use(self) -> None:
        """Mark the pages with what their stream, if there is one, was asked for until now."""
        stream, self.stream = self.stream, None
        if (end := mark(stream)) is not None:
            self.slab.mark(self.page_ids, end)

    def give_back(self) -> None:
        """Make the pages free, for good."""
        self.is_returned = True
        self.slab.give_back(self.page_ids)


def span(ids: Sequence[int]) -> slice | None:
    """Ascending ``ids`` as a slice, or None if they do not follow one another."""
    if not ids:
        return slice(0, 0)
    return slice(ids[0], ids[-1] + 1) if ids[-1] - ids[0] == len(ids) - 1 else None
