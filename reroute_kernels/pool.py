"""The paged pool: home of the prompt's residual stream during a prefill.

Pages let prompts of different sizes, several prefills at once and several models of one width
share one buffer. Everything here is decided on the host from integer counts.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import TracebackType
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .streams import Mark, is_capturing, mark, queue_behind, stream_of, stream_on
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


@dataclass(eq=False)
class _Slab:
    """One tensor of pages, its free page ids (ascending), and for each page the mark of its last use."""

    memory: Tensor
    free: list[int]
    marks: list[Mark | None]

    @property
    def pages(self) -> int:
        return self.memory.shape[0]

    def run(self, count: int) -> int | None:
        """Where in ``free`` the first run of ``count`` consecutive pages begins."""
        free = self.free
        starts = range(len(free) - count + 1 if count else 0)
        return next((i for i in starts if free[i + count - 1] - free[i] == count - 1), None)

    def take(self, count: int) -> list[int]:
        first = self.run(count) or 0
        taken = self.free[first : first + count]
        del self.free[first : first + count]
        return taken

    def give_back(self, pages: Sequence[int]) -> None:
        self.free.extend(pages)
        self.free.sort()

    def marks_of(self, pages: Sequence[int]) -> set[Mark | None]:
        span = _span(pages)
        return set(map(self.marks.__getitem__, pages) if span is None else self.marks[span])

    def mark(self, pages: Sequence[int], mark: Mark) -> None:
        span = _span(pages)
        if span is not None:
            self.marks[span] = [mark] * len(pages)
        else:
            for page in pages:
                self.marks[page] = mark


class Lease:
    """Pages for one prefill; a context manager, released on exit.

    ``pages``, ``table`` and ``rows()`` raise RuntimeError once the lease is released. The CUDA stream that was current
    when the lease was taken may use it. Before another one does, call ``begin_use`` there.

    Attributes:
        starts: first pool row of each sample, a multiple of the page size.
        lengths: rows of each sample.
        num_rows: R, rows of all pages; the rows after a sample's last one, its page tail, are zero.
    """

    def __init__(
        self, pool: PagedPool, slab: _Slab, page_ids: Sequence[int], starts: tuple[int, ...], lengths: tuple[int, ...]
    ) -> None:
        """Made by ``PagedPool.lease``, which has taken the pages."""
        self._pool = pool
        self._slab: _Slab | None = slab
        self._page_ids = page_ids
        span = _span(page_ids)
        self._view = None if span is None else slab.memory[span].view(-1, pool.width)
        self._table: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None  # that uses the lease now
        self.starts = starts
        self.lengths = lengths
        self.num_rows = len(page_ids) * pool.page_size

    @property
    def pages(self) -> Tensor:
        """The slab that holds the lease: (P, page_size, C)."""
        return self._alive()[0].memory

    @property
    def table(self) -> Tensor:
        """Page ids of the lease in row order: (T,) int64 on the device."""
        return self._alive()[1]

    def rows(self) -> Tensor:
        """All rows in lease order, (R, C): a view of the pool where the pages are consecutive.

        Elsewhere a gathered copy; so read from it, and write with ``defer``.
        """
        slab, table = self._alive()
        return slab.memory[table].view(-1, slab.memory.shape[-1]) if self._view is None else self._view

    def begin_use(self) -> None:
        """Hand the lease over to the current CUDA stream, whose later work waits for the uses before.

        Nothing is waited for inside a CUDA graph capture: see ``reroute_kernels.streams.queue_behind``.
        """
        self._begin_use(self._alive()[0])

    def end_use(self) -> None:
        """End the use by its CUDA stream: a later one on another stream waits for what was queued until now.

        Without this call it waits for all that was queued until it begins.
        """
        slab, stream, self._stream = self._slab, self._stream, None
        if slab is not None and (end := mark(stream)) is not None:
            slab.mark(self._page_ids, end)

    def release(self) -> None:
        """Return the pages to the pool; a second call does nothing.

        The current CUDA stream counts as their last user, behind the uses before. If graphs with this lease were
        replayed, release on a stream that has waited for the replays.
        """
        with self._pool._lock:
            if self._slab is not None:
                self._return_pages(self._slab)
                self._pool._leases -= 1

    def _prepare(self, slab: _Slab) -> None:
        """Wait for the former holders of the pages, clear the page tails and upload the page table."""
        self._begin_use(slab)
        # Projections read whole pages. A tail left as found could hold another prefill's NaN, or
        # shift the scale of a quantised projection: a result would depend on the pool's past.
        for start, length in zip(self.starts, self.lengths, strict=True):
            page, used = divmod(start + length, self._pool.page_size)
            if used:
                slab.memory[self._page_ids[page], used:].zero_()
        self._table = upload(self._page_ids, slab.memory.device)

    def _begin_use(self, slab: _Slab) -> None:
        stream = stream_of(slab.memory)
        if stream is None or stream == self._stream:
            return
        self.end_use()
        queue_behind(slab.marks_of(self._page_ids), stream)
        # The allocator knows only of the stream on which a tensor was made, and would hand its memory on too early.
        for tensor in (slab.memory, self._table):
            if tensor is not None:
                tensor.record_stream(stream)
        self._stream = stream

    def _return_pages(self, slab: _Slab) -> None:
        self._begin_use(slab)
        self.end_use()
        self._slab = self._table = self._view = None
        slab.give_back(self._page_ids)

    def _alive(self) -> tuple[_Slab, Tensor]:
        slab, table = self._slab, self._table
        if slab is None or table is None:
            raise RuntimeError("this lease was released; take a new one with PagedPool.lease()")
        return slab, table

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
        """Make an empty pool; ValueError if ``max_bytes`` is below one page or a size below 1."""
        if width < 1 or page_size < 1:
            raise ValueError(f"width and page_size must be at least 1: got {width}, {page_size}")
        self.width, self.dtype, self.page_size, self.max_bytes = width, dtype, page_size, max_bytes
        self.device = _probe(device).device
        self._page_bytes = page_size * width * dtype.itemsize
        if max_bytes is not None and max_bytes < self._page_bytes:
            raise ValueError(f"max_bytes={max_bytes} is below one page of {self._page_bytes} bytes")
        self._lock = threading.Lock()
        self._slabs: list[_Slab] = []
        self._leases = 0
        self._peak_pages = 0

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
            slab = self._find(total)
            lease = Lease(self, slab, slab.take(total), starts, tuple(lengths))
            try:
                lease._prepare(slab)
            except BaseException:
                lease._return_pages(slab)
                raise
            self._leases += 1
            self._peak_pages = max(self._peak_pages, self._pages_in_use())
        return lease

    def trim(self) -> None:
        """Drop the slabs that hold no lease."""
        with self._lock:
            self._trim()

    def stats(self) -> PoolStats:
        """Pages and bytes, reserved and in use."""
        with self._lock:
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

    def _find(self, count: int) -> _Slab:
        if count == 0:
            return self._new_slab(0)  # outside the list: nothing to share, nothing to return
        fitting = [slab for slab in self._slabs if len(slab.free) >= count]
        if fitting:
            return next((slab for slab in fitting if slab.run(count) is not None), fitting[0])
        return self._grow(count)

    def _grow(self, count: int) -> _Slab:
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

    def _least_slab(self, count: int) -> _Slab:
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

    def _new_slab(self, pages: int) -> _Slab:
        memory = torch.empty((pages, self.page_size, self.width), dtype=self.dtype, device=self.device)
        # Its stream may have been asked for work with what was there before: others wait for that too.
        return _Slab(memory, list(range(pages)), [mark(stream_of(memory))] * pages)

    def _trim(self) -> None:
        self._slabs = [slab for slab in self._slabs if len(slab.free) < slab.pages]

    def _pages(self) -> int:
        return sum(slab.pages for slab in self._slabs)

    def _pages_in_use(self) -> int:
        return self._pages() - sum(len(slab.free) for slab in self._slabs)


def _span(ids: Sequence[int]) -> slice | None:
    """Ascending ``ids`` as a slice, or None if they do not follow one another."""
    if not ids:
        return slice(0, 0)
    return slice(ids[0], ids[-1] + 1) if ids[-1] - ids[0] == len(ids) - 1 else None


def _probe(device: torch.device | str) -> Tensor:
    """An empty tensor: its device has an index, and its type says whether tensors are fake now."""
    return torch.empty(0, device=device)
