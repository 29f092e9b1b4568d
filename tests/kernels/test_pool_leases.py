"""Leases that nobody releases: their pages come back, once."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pools import PAGE, WIDTH, make

from reroute_kernels import PagedPool


class TimeIsUp(BaseException):
    """As raised into a worker thread."""


@pytest.fixture
def uncollected() -> Iterator[None]:
    """No garbage collection: what is in no cycle goes at once."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def die_with_a_lease(pool: PagedPool, pages: int) -> None:
    """A thread that takes a lease and ends without a word to the pool."""

    def work() -> None:
        lease = pool.lease([pages * PAGE])
        lease.rows().fill_(1.0)
        raise TimeIsUp

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.fixture
def silent_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)


@pytest.mark.usefixtures("uncollected")
def test_a_lease_that_nobody_holds_gives_its_pages_back() -> None:
    pool = make(max_pages=3)
    forgotten, kept = pool.lease([PAGE]), pool.lease([2 * PAGE])
    kept.rows().fill_(1.0)
    reference = weakref.ref(forgotten)
    del forgotten
    assert reference() is None
    assert (pool.stats().leases, pool.stats().pages_in_use) == (1, 2)
    with pool.lease([PAGE]) as lease:
        lease.rows().fill_(2.0)
    assert torch.equal(kept.rows(), torch.ones(2 * PAGE, WIDTH))
    del kept
    pool.trim()
    assert (pool.stats().leases, pool.stats().pages) == (0, 0)


@pytest.mark.usefixtures("uncollected", "silent_threads")
def test_threads_that_die_give_their_pages_back() -> None:
    pool = make(max_pages=3)
    for pages in (1, 3, 2, 3):
        die_with_a_lease(pool, pages)
    assert (pool.stats().leases, pool.stats().pages_in_use) == (0, 0)
    with pool.lease([3 * PAGE]) as lease:
        assert len(set(lease.table.tolist())) == 3


def test_a_lease_in_a_cycle_comes_back_when_it_is_collected() -> None:
    pool = make(max_pages=1)
    lease: Any = pool.lease([1])
    lease.itself = lease
    del lease
    gc.collect()
    with pool.lease([1]):
        assert pool.stats().leases == 1


def test_a_lease_and_its_pool_in_one_cycle() -> None:
    pool: Any = make()
    pool.lease_of_mine = pool.lease([1])
    reference = weakref.ref(pool)
    del pool
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("operation", ["lease", "stats", "trim"])
def test_a_lease_may_be_collected_inside_the_lock(monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    """In the thread that has it: any allocation there may start the garbage collector."""
    pool = make(max_pages=4)
    pool.lease([4 * PAGE]).release()
    held: list[Any] = [pool.lease([PAGE]), pool.lease([PAGE])]
    held[0].itself = held[0]

    def collecting(method: Callable[..., Any]) -> Callable[..., Any]:
        def collect_first(*arguments: Any) -> Any:
            assert pool._lock.locked()
            held.clear()
            gc.collect()
            return method(*arguments)

        return collect_first

    inside = {"lease": "_find", "stats": "_pages_in_use", "trim": "_trim"}[operation]
    monkeypatch.setattr(PagedPool, inside, collecting(getattr(PagedPool, inside)))
    work = threading.Thread(target=getattr(pool, operation), args=([[PAGE]] if operation == "lease" else []))
    work.daemon = True
    work.start()
    work.join(timeout=20)
    assert not work.is_alive()
    monkeypatch.undo()
    assert (pool.stats().leases, pool.stats().pages_in_use) == (0, 0)
    with pool.lease([4 * PAGE]) as lease:
        assert sorted(lease.table.tolist()) == [0, 1, 2, 3]


@pytest.mark.usefixtures("uncollected")
def test_pages_come_back_only_once() -> None:
    """Whether a lease is released, forgotten afterwards, or released in two places at once."""
    pool = make(max_pages=2)
    pool.lease([2 * PAGE]).release()
    lease = pool.lease([PAGE])
    twin = copy.copy(lease)
    lease.release()
    twin.release()
    first = pool.lease([PAGE])
    del lease, twin
    second = pool.lease([PAGE])
    assert first.table.tolist() != second.table.tolist()
    assert (pool.stats().leases, pool.stats().pages_in_use) == (2, 2)


@pytest.mark.usefixtures("uncollected")
def test_a_lease_that_could_not_be_made_ready_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make(max_pages=1)
    with monkeypatch.context() as patch:
        patch.setattr("reroute_kernels.pool.upload", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.lease([1])
    assert (pool.stats().leases, pool.stats().pages_in_use) == (0, 0)
    pool.lease([1]).release()


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt
