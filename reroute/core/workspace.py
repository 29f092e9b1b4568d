"""What the prefills of one plan hold on a device: pool rows and index tables."""

from __future__ import annotations

import threading
import weakref

from reroute_kernels import Lease, PagedPool

from .plan import Plan
from .plan_tensors import PlanTensors

__all__ = ["Workspace"]


class Workspace:
    """A place in a pool for the prefills of one plan, one after the other, on any CUDA stream.

    The first prefill leases the rows and uploads the index tables; both stay where they are until ``release``. So any
    later one allocates no pool rows and uploads nothing, and may be captured in a CUDA graph.
    """

    def __init__(self, plan: Plan) -> None:
        """Nothing is held yet."""
        self._plan = plan
        self._held: tuple[PagedPool, Lease, PlanTensors] | None = None
        self._lock = threading.Lock()
        self._user: weakref.ref[object] | None = None
        self._is_over = False

    def claim(self, user: object) -> bool:
        """Whether ``user`` has the place for itself until ``leave``: not while another one lives that has it."""
        with self._lock:
            if self._is_over or self._is_used:
                return False
            self._user = weakref.ref(user)
            return True

    def leave(self, user: object) -> None:
        """Undo ``claim``. Idempotent."""
        with self._lock:
            if self._user is None or self._user() is not user:
                return
            if self._held is not None:
                self._held[1].end_use()
            self._user = None
            if self._is_over:
                self._give_back()

    def take(self, pool: PagedPool) -> tuple[Lease, PlanTensors]:
        """The lease and the index tables, for the current CUDA stream.

        Raises:
            PoolLimitError: the pool may not grow to hold the prompt; nothing is held then.
            torch.OutOfMemoryError: the device has no room for it; likewise.
        """
        if self._held is not None and self._held[0] is pool:
            _, lease, tensors = self._held
            lease.begin_use()
            tensors.join()
            return lease, tensors
        self._give_back()
        lease = pool.lease(self._plan.lengths)
        try:
            tensors = self._plan.tensors(lease.starts, lease.num_rows, pool.device)
        except BaseException:
            lease.release()
            raise
        self._held = pool, lease, tensors
        return lease, tensors

    def release(self) -> None:
        """Give the rows back, at once or when their user leaves. Idempotent."""
        with self._lock:
            self._is_over = True
            if not self._is_used:
                self._give_back()

    @property
    def _is_used(self) -> bool:
        return self._user is not None and self._user() is not None

    def _give_back(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            _, lease, tensors = held
            tensors.join()  # graphs with these tables may have been replayed on this stream
            lease.release()
