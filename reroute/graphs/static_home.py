"""Home of the prefills of a graph: rows that lie where they lay when it was captured."""

from __future__ import annotations

from typing import NamedTuple

import torch

from reroute_kernels import Backend, RMSNorm

from ..core.home import Home
from ..core.plan_tensors import PlanTensors
from .shape_class import TILE

__all__ = ["StaticHome"]


class _Rows(NamedTuple):
    """``reroute_kernels.pool.Pages`` of memory that is all of it."""

    pages: torch.Tensor
    table: torch.Tensor

    def rows(self) -> torch.Tensor:
        """See ``Pages``."""
        return self.pages.view(-1, self.pages.shape[-1])


class StaticHome(Home):
    """R rows in memory that is given, of one prompt after the other."""

    is_recorded = False

    def __init__(self, backend: Backend, tensors: PlanTensors, memory: torch.Tensor) -> None:
        """``memory`` (R, C), R a multiple of 64."""
        super().__init__(backend, tensors, memory.dtype, memory.device)
        pages = memory.view(-1, TILE, memory.shape[1])
        self._rows = _Rows(pages, torch.arange(len(pages), device=memory.device))

    def clear(self) -> None:
        """Forget the prompt before: where a sample ends, its rows would be projected with those of this one."""
        self._rows.pages.zero_()

    @property
    def table(self) -> torch.Tensor:
        """(R / 64,): which page is where."""
        return self._rows.table

    def defer(self, rows: torch.Tensor, hidden: torch.Tensor) -> None:
        """See ``Home``."""
        self.backend.defer(self._rows.pages, self._rows.table, rows, hidden)

    def defer_rmsnorm(
        self, rows: torch.Tensor, inverse_index: torch.Tensor, hidden: torch.Tensor, norm: RMSNorm
    ) -> torch.Tensor:
        """See ``Home``."""
        return self.backend.defer_rmsnorm(self._rows, rows, inverse_index, hidden, norm)

    def states(self) -> torch.Tensor:
        """See ``Home``."""
        return self._rows.rows()

    def admit(self, rows: torch.Tensor, *tables: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See ``Home``."""
        return self.backend.admit(self._rows.pages, self._rows.table, rows, *tables)

    def close(self) -> None:
        """See ``Home``: nothing is shared while a graph runs."""
