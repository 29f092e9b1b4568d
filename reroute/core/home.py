"""Home: where the latest hidden state of every prompt token is during a prefill, and is read for ranking.

For inference that is the paged pool, which is written in place. Where autograd records it is a tensor that every
deferral replaces by a new one, so that the gradient of a row goes where the row came from: back through the layers that
ran it, and past those that it bypassed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from itertools import accumulate
from typing import ClassVar

import torch

from reroute_kernels import Backend, PagedPool, RMSNorm

from ..errors import RerouteError
from .plan import Plan
from .plan_tensors import PlanTensors
from .workspace import Workspace

__all__ = ["Home", "PooledHome", "RecordedHome", "is_recorded"]


def is_recorded(hidden: torch.Tensor, parameters: Iterable[torch.Tensor]) -> bool:
    """Whether autograd records the layers with these ``parameters`` that run on ``hidden``; never under no_grad."""
    return torch.is_grad_enabled() and (hidden.requires_grad or any(p.requires_grad for p in parameters))


class Home(ABC):
    """R rows of C features, numbered as ``tensors`` places the samples; -1 stands for a filler.

    - ``backend``: what ranks them, and moves them in the pool.
    - ``tensors``: index tensors of the prefill's plan for this placement.
    - ``dtype``, ``device``: of the rows.
    """

    is_recorded: ClassVar[bool]
    """Whether gradients pass through ``defer`` and ``admit``."""

    def __init__(self, backend: Backend, tensors: PlanTensors, dtype: torch.dtype, device: torch.device) -> None:
        """Subclasses hold the rows."""
        self.backend, self.tensors, self.dtype, self.device = backend, tensors, dtype, device

    @abstractmethod
    def defer(self, rows: torch.Tensor, hidden: torch.Tensor) -> None:
        """Write ``hidden`` (B, S, C) to ``rows`` (B, S), each of which may occur once; fillers are skipped."""

    @abstractmethod
    def defer_rmsnorm(
        self, rows: torch.Tensor, inverse_index: torch.Tensor, hidden: torch.Tensor, norm: RMSNorm
    ) -> torch.Tensor:
        """Defer; and all rows (R, C) after a norm, without gradients. ``inverse_index`` (R,) inverts ``rows``."""

    @abstractmethod
    def states(self) -> torch.Tensor:
        """All rows (R, C), to read only."""

    @abstractmethod
    def admit(self, rows: torch.Tensor, *tables: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Copies (B, S, C) of ``rows`` (B, S), and (B, S, w) of each of ``tables`` (R, w); fillers become zeros."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what is shared with other prefills. Idempotent."""

    def check(self, hidden: torch.Tensor, what: str) -> None:
        """Refuse hidden states that ``defer`` could not take as they are; ``what`` names them.

        Raises:
            RerouteError: they are of another dtype than those before them, or need gradients that nobody records.
        """
        if hidden.dtype != self.dtype:
            raise RerouteError(
                f"{what} are {hidden.dtype}, and those at the first decision were {self.dtype}: all states of a prompt "
                "are held in one dtype. Give the decoder's layers and norms one dtype, as model.to(dtype) does, or "
                "make the first decision behind the layer that changes it."
            )
        if hidden.requires_grad and torch.is_grad_enabled() and not self.is_recorded:
            raise RerouteError(
                f"{what} require gradients, and at the first decision neither the hidden states nor a parameter of the "
                "decoder did: the gradients of deferred tokens would be lost. Let the decoder's input require them "
                "(model.enable_input_require_grads()), or run the forward under torch.no_grad()."
            )


class PooledHome(Home):
    """Rows of a paged pool, leased until ``close``."""

    is_recorded = False

    def __init__(self, plan: Plan, backend: Backend, pool: PagedPool, workspace: Workspace | None = None) -> None:
        """Take rows in ``pool``.

        A ``workspace`` of ``plan`` that is passed stays the caller's to release. While another prefill uses it, this
        one has a place of its own.

        Raises:
            PoolLimitError: the pool may not grow to hold the prompt; nothing is held then.
            torch.OutOfMemoryError: the device has no room for it; likewise.
        """
        self._workspace = workspace if workspace is not None and workspace.claim(self) else Workspace(plan)
        self._is_reserved = self._workspace is workspace
        try:
            self._lease, tensors = self._workspace.take(pool)
        except BaseException:
            self.close()
            raise
        super().__init__(backend, tensors, pool.dtype, pool.device)

    def defer(self, rows: torch.Tensor, hidden: torch.Tensor) -> None:
        """See ``Home``."""
        self.backend.defer(self._lease.pages, self._lease.table, rows, hidden.to(self.device))

    def defer_rmsnorm(
        self, rows: torch.Tensor, inverse_index: torch.Tensor, hidden: torch.Tensor, norm: RMSNorm
    ) -> torch.Tensor:
        """See ``Home``."""
        return self.backend.defer_rmsnorm(self._lease, rows, inverse_index, hidden.to(self.device), norm)

    def states(self) -> torch.Tensor:
        """See ``Home``."""
        return self._lease.rows()

    def admit(self, rows: torch.Tensor, *tables: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See ``Home``."""
        return self.backend.admit(self._lease.pages, self._lease.table, rows, *tables)

    def close(self) -> None:
        """Give the pool rows back, unless they are reserved."""
        if self._is_reserved:
            self._workspace.leave(self)
        else:
            self._workspace.release()


class RecordedHome(Home):
    """A tensor (R + 1, C) of this prefill alone, of which autograd knows where each row came from.

    Samples follow one another without gaps. The spare last row is zero: fillers are written there, and read from there.
    """

    is_recorded = True

    def __init__(self, plan: Plan, backend: Backend, hidden: torch.Tensor, device: torch.device) -> None:
        """For states like ``hidden`` (B, L, C), on ``device``."""
        *starts, num_rows = accumulate(plan.lengths, initial=0)
        super().__init__(backend, plan.tensors(starts, num_rows, device), hidden.dtype, device)
        self._states = torch.zeros(num_rows + 1, hidden.shape[-1], dtype=hidden.dtype, device=device)

    def defer(self, rows: torch.Tensor, hidden: torch.Tensor) -> None:
        """See ``Home``. Recorded even if a ranker asks, under no_grad, for what it writes."""
        rows = rows.flatten()
        fillers = rows < 0
        with torch.enable_grad():
            values = hidden.to(self.device).flatten(0, 1).masked_fill(fillers[:, None], 0)
            self._states = self._states.index_copy(0, self._slots(rows, fillers), values)

    def defer_rmsnorm(
        self, rows: torch.Tensor, inverse_index: torch.Tensor, hidden: torch.Tensor, norm: RMSNorm
    ) -> torch.Tensor:
        """See ``Home``."""
        self.defer(rows, hidden)
        return norm(self.states().detach())

    def states(self) -> torch.Tensor:
        """See ``Home``."""
        return self._states[:-1]

    def admit(self, rows: torch.Tensor, *tables: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See ``Home``."""
        fillers, shape = rows < 0, rows.shape
        states = self._states.index_select(0, self._slots(rows, fillers).flatten()).unflatten(0, shape)
        index, empty = rows.clamp(min=0).flatten(), fillers[:, :, None]
        return states, *(t.index_select(0, index).unflatten(0, shape).masked_fill(empty, 0) for t in tables)

    def close(self) -> None:
        """See ``Home``: nothing is shared."""

    def _slots(self, rows: torch.Tensor, fillers: torch.Tensor) -> torch.Tensor:
        return rows.masked_fill(fillers, self._states.shape[0] - 1)
