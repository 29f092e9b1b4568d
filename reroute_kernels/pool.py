"""The paged pool: home of the prompt's residual stream during a prefill.

Pages let prompts of different sizes, several prefills at once and several models of one width
share one buffer. Everything here is decided on the host from integer counts.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import TracebackType
from typing import Any, ClassVar, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .slabs import Holding, Slab, span
from .streams import is_capturing, mark, queue_behind, stream_of, stream_on
from .upload import upload

_WAYS_OUT = "use a smaller batch or shorter prompts, or wait for running prefills to end"


class PoolLimitError(MemoryError):
    """A lease does not fit below the pool's ``max_bytes``."""


@dataclass(frozen=True)
class PoolStats:
    """Counts of a pool at one moment; ``leases`` are those alive."""

    pages: int
    pages_in_use: int
    page_size: int
    bytes_reserved: int
    bytes_in_use: int
    peak_bytes_in_use: int
    leases: int


class Pages(Protocol):
    """R rows in pages: those of a lease, or others that lie alike.

    - ``pages`` (P, page_size, C): memory that holds them; ``table`` (T,) int64: page ids in row order.
    """

    @property
    def pages(self) -> Tensor:
        """See above."""

    @property
    def table(self) -> Tensor:
        """See above."""

    def rows(self) -> Tensor:
        """All of them (R, C), to read only."""


class Lease:
    """Pages for one prefill; a context manager, released on exit.

    ``pages``, ``table`` and ``rows()`` raise RuntimeError once the lease is released. The CUDA stream that was current
    when the lease was taken may use it. Before another one does, call ``begin_use`` there.

    A lease that nobody holds any more gives its pages back too, so hold it for as long as its rows are used: after an
    interrupt, or in a thread that has ended, nobody is left to release it.

    Attributes:
        starts: first pool row of each sample, a multiple of the page size.
        lengths: rows of each sample.
        num_rows: R, rows of all pages; the rows after a sample's last one, its page tail, are zero.
    """

    _holding: Holding | None = None

    def __init__(
        self, pool: PagedPool, slab: Slab, page_ids: Sequence[int], starts: tuple[int, ...], lengths: tuple[int, ...]
    ) -> None:
        """Made by ``PagedPool.lease``, which has taken the pages."""
        self._pool = pool
        self._holding = Holding(slab, page_ids)
        ids = span(page_ids)
        self._view = None if ids is None else slab.memory[ids].view(-1, pool.width)
        self._table: Tensor | None = None
        self.starts = starts
        self.lengths = lengths
        self.num_rows = len(page_ids) * pool.page_size

    def __del__(self) -> None:
        """Leave the pages to the pool. It may be inside of its lock right now, in this very thread."""
        if self._holding is not None:
            self._pool._leave(self._holding)

    @property
    def pages(self) -> Tensor:
        """The slab that holds the lease: (P, page_size, C)."""
        return self._alive()[0].slab.memory

    @property
    def table(self) -> Tensor:
        """Page ids of the lease in row order: (T,) int64 on the device."""
        return self._alive()[1]

    def rows(self) -> Tensor:
        """All rows in lease order, (R, C): a view of the pool where the pages are consecutive.

        Elsewhere a gathered copy; so read from it, and write with ``defer``.
        """
        holding, table = self._alive()
        memory = holding.slab.memory
        return memory[table].view(-1, memory.shape[-1]) if self._view is None else self._view

    def begin_use(self) -> None:
        """Hand the lease over to the current CUDA stream, whose later work waits for the uses before.

        Nothing is waited for inside a CUDA graph capture: see ``reroute_kernels.streams.queue_behind``.
        """
        self._begin_use(self._alive()[0])

    def end_use(self) -> None:
        """End the use by its CUDA stream: a later one on another stream waits for what was queued until now.

        Without this call it waits for all that was queued until it begins.
        """
        if self._holding is not None:
            self._holding.end_use()

    def release(self) -> None:
        """Return the pages to the pool; a second call does nothing.

        The current CUDA stream counts as their last user, behind the uses before. If graphs with this lease were
        replayed, release on a stream that has waited for the replays.
        """
        holding, self._holding = self._holding, None
        if holding is None:
            return
        try:
            self._begin_use(holding)
            holding.end_use()
        finally:
            self._table = self._view = None
            self._pool._leave(holding)

    def _prepare(self) -> None:
        """Wait for the former holders of the pages, clear the page tails and upload the page table."""
        holding = self._holding
        assert holding is not None
        self._begin_use(holding)
        memory, page_ids = holding.slab.memory, holding.page_ids
        # Projections read whole pages. A tail left as found could hold another prefill's NaN, or
        # shift the scale of a quantised projection: a result would depend on the pool's past.
        for start, length in zip(self.starts, self.lengths, strict=True):
            page, used = divmod(start + length, self._pool.page_size)
            if used:
                memory[page_ids[page], used:].zero_()
        self._table = upload(page_ids, memory.device)

    def _begin_use(self, holding: Holding) -> None:
        slab = holding.slab
        stream = stream_of(slab.memory)
        if stream is None or stream == holding.stream:
            return
        holding.end_use()
        queue_behind(slab.marks_of(holding.page_ids), stream)
        # The allocator knows only of the stream on which a tensor was made, and would hand its memory on too early.
        for tensor in (slab.memory, self._table):
            if tensor is not None:
                tensor.record_stream(stream)
        holding.stream = stream

    def _alive(self) -> tuple[Holding, Tensor]:
        holding, table = self._holding, self._table
        if holding is None or table is None:
            raise RuntimeError("this lease was released; take a new one with PagedPool.lease()")
        return holding, table

    def __enter__(self) -> Lease:
        """Return the lease itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release, also after an exception."""
        self.release()


class PagedPool:
    """Pages of ``page_size`` rows of ``width`` features, leased to prefills; thread-safe.

    Growth never copies: the pool is a list of slabs and a lease lives wholly in one. Released
    memory stays in the pool until ``trim``, or until the device has no room for another slab. No
    call waits for the device, unless PyTorch's allocator does when memory is short. On CUDA, take a
    lease before a graph capture begins, not inside it.
    """

    _shared: ClassVar[WeakValueDictionary[tuple[Any, ...], PagedPool]] = WeakValueDictionary()
    _shared_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(
        self,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        page_size: int = 64,
        max_bytes: int | None = None,
    ) -> None:
        """Make an empty pool.

        Raises:
            ValueError: ``max_bytes`` is below one page, a size is below 1, or something is of another type.
        """
        whole = width, page_size, 1 if max_bytes is None else max_bytes
        if not all(isinstance(size, int) for size in whole) or not isinstance(dtype, torch.dtype):
            raise ValueError(
                "a pool takes whole numbers and a torch.dtype, such as PagedPool(4096, torch.float16, 'cuda', "
                f"max_bytes=256 << 20): got width={width!r}, dtype={dtype!r}, page_size={page_size!r}, "
                f"max_bytes={max_bytes!r}"
            )
        if width < 1 or page_size < 1:
            raise ValueError(f"width and page_size must be at least 1: got {width}, {page_size}")
        self.width, self.dtype, self.page_size, self.max_bytes = width, dtype, page_size, max_bytes
        self.device = _probe(device).device
        self._page_bytes = page_size * width * dtype.itemsize
        if max_bytes is not None and max_bytes < self._page_bytes:
            raise ValueError(f"max_bytes={max_bytes} is below one page of {self._page_bytes} bytes")
        self._lock = threading.Lock()
        self._slabs: list[Slab] = []
        self._leases = 0
        self._peak_pages = 0
        self._left: deque[Holding] = deque()

    @classmethod
    def shared(cls, width: int, dtype: torch.dtype, device: torch.device | str) -> PagedPool:
        """The process's pool for this width, dtype and device; it goes with its last user."""
        probe = _probe(device)
        # The tensor type keeps fake and real slabs apart.
        key = (width, dtype, probe.device, type(probe))
        with cls._shared_lock:
            pool = cls._shared.get(key)
            if pool is None:
                pool = cls._shared[key] = cls(width, dtype, device)
            return pool

    def lease(self, lengths: Sequence[int]) -> Lease:
        """Pages for one prefill of B samples with ``lengths[b]`` rows each.

        A sample starts on a page of its own; an empty one takes none.

        Raises:
            ValueError: a length is negative.
            PoolLimitError: ``max_bytes`` forbids the pages.
            torch.OutOfMemoryError: the device has no room for them (RuntimeError on the CPU).
            RuntimeError: inside a CUDA graph capture.
        """
        if any(length < 0 for length in lengths):
            raise ValueError(f"lengths must not be negative: got {list(lengths)}")
        if is_capturing(stream_on(self.device)):
            raise RuntimeError("a lease cannot be taken inside a CUDA graph capture: take it before, and hold it")
        counts = [-(-length // self.page_size) for length in lengths]
        *firsts, total = accumulate(counts, initial=0)
        starts = tuple(first * self.page_size for first in firsts)
        # A slab born in inference mode could not be written outside it later.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._take_back()
            slab = self._find(total)
            lease = Lease(self, slab, slab.take(total), starts, tuple(lengths))
            self._leases += 1
            try:
                lease._prepare()
            except BaseException:
                lease.release()
                raise
            self._peak_pages = max(self._peak_pages, self._pages_in_use())
        return lease

    def trim(self) -> None:
        """Drop the slabs that hold no lease."""
        with self._lock:
            self._take_back()
            self._trim()

    def stats(self) -> PoolStats:
        """Pages and bytes, reserved and in use."""
        with self._lock:
            self._take_back()
            pages, in_use = self._pages(), self._pages_in_use()
            return PoolStats(
                pages=pages,
                pages_in_use=in_use,
                page_size=self.page_size,
                bytes_reserved=pages * self._page_bytes,
                bytes_in_use=in_use * self._page_bytes,
                peak_bytes_in_use=self._peak_pages * self._page_bytes,
                leases=self._leases,
            )

    def _leave(self, holding: Holding) -> None:
        """Take note of pages that are given back, by a lease or by the garbage collector.

        The collector may run anywhere, also inside of the lock or of a CUDA graph capture: so nothing is done here.
        """
        self._left.append(holding)

    def _take_back(self) -> None:
        """Give the pages that were left to their slabs; the lock is held."""
        for _ in range(len(self._left)):
            holding = self._left.popleft()
            if holding.is_returned:
                continue
            if is_capturing(holding.stream):  # the work of a lease that nobody released cannot be marked now
                self._left.append(holding)
                continue
            holding.end_use()
            holding.give_back()
            self._leases -= 1

    def _find(self, count: int) -> Slab:
        if count == 0:
            return self._new_slab(0)  # outside the list: nothing to share, nothing to return
        fitting = [slab for slab in self._slabs if len(slab.free) >= count]
        if fitting:
            return next((slab for slab in fitting if slab.run(count) is not None), fitting[0])
        return self._grow(count)

    def _grow(self, count: int) -> Slab:
        size = max(count, 2 * self._slabs[-1].pages if self._slabs else 0)
        if self.max_bytes is not None:
            limit = self.max_bytes // self._page_bytes
            if count > limit - self._pages():
                self._trim()  # idle slabs, each too small for this lease
            if count > limit - self._pages():
                raise PoolLimitError(
                    f"{self._shortage(count)} and the limit is {self.max_bytes}: raise max_bytes, {_WAYS_OUT}"
                )
            size = min(size, limit - self._pages())
        try:
            slab = self._new_slab(size)
        except RuntimeError:  # out of memory: on the CPU it has no class of its own
            slab = self._least_slab(count)
        self._slabs.append(slab)
        return slab

    def _least_slab(self, count: int) -> Slab:
        """What a lease needs and no more, with the memory of idle slabs, each of which is too small for it."""
        self._trim()
        try:
            return self._new_slab(count)
        except RuntimeError as error:
            # The allocator's class and text stay: callers look for them to try a smaller batch, and a PoolLimitError
            # would send users to max_bytes, which is not what is short.
            if self.device.type == "cpu" or isinstance(error, torch.OutOfMemoryError):
                error.args = (f"{error}\n{self._shortage(count)}: {_WAYS_OUT}",)
            raise

    def _shortage(self, count: int) -> str:
        reserved, in_use = self._pages() * self._page_bytes, self._pages_in_use() * self._page_bytes
        return (
            f"the pool needs {count * self._page_bytes} bytes in one piece; {in_use} bytes are in use (slabs with "
            f"leases hold {reserved}, and {reserved - in_use} of them are free)"
        )

    def _new_slab(self, pages: int) -> Slab:
        memory = torch.empty((pages, self.page_size, self.width), dtype=self.dtype, device=self.device)
        # Its stream may have been asked for work with what was there before: others wait for that too.
        return Slab(memory, list(range(pages)), [mark(stream_of(memory))] * pages)

    def _trim(self) -> None:
        self._slabs = [slab for slab in self._slabs if len(slab.free) < slab.pages]

    def _pages(self) -> int:
        return sum(slab.pages for slab in self._slabs)

    def _pages_in_use(self) -> int:
        return self._pages() - sum(len(slab.free) for slab in self._slabs)


def _probe(device: torch.device | str) -> Tensor:
    """An empty tensor: its device has an index, and its type says whether tensors are fake now."""
    return torch.empty(0, device=device)
