"""How a pool grows, up to its limit or that of its device, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import finalize

import pytest
import torch
from pools import PAGE, PAGE_BYTES, WIDTH, make

from reroute_kernels import PoolLimitError

FULL = {
    torch.OutOfMemoryError: "CUDA out of memory. Tried to allocate 2.00 MiB.",
    RuntimeError: "DefaultCPUAllocator: can't allocate memory",
}
errors = pytest.mark.parametrize("error", FULL, ids=["GPU", "CPU"])


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call it with the number of pages for which there is room, until they are given back."""
    empty, used = torch.empty, list[int]()

    def limit(pages: int, error: type[RuntimeError] = torch.OutOfMemoryError) -> None:
        def limited(size: Any, **options: Any) -> torch.Tensor:
            wanted = size[0] if isinstance(size, tuple) else 0
            if sum(used) + wanted > pages:
                raise error(FULL[error])
            tensor = empty(size, **options)
            used.append(wanted)
            finalize(tensor.untyped_storage(), used.remove, wanted)
            return tensor

        monkeypatch.setattr(torch, "empty", limited)

    return limit


def test_growth_doubles_never_copies_and_stops_at_the_limit() -> None:
    pool = make(max_pages=9)
    first = pool.lease([2 * PAGE])
    address = first.pages.data_ptr()
    second = pool.lease([PAGE])
    third = pool.lease([3 * PAGE])
    assert [lease.pages.shape[0] for lease in (first, second, third)] == [2, 4, 4]
    assert first.pages.data_ptr() == address
    assert second.pages is third.pages
    fourth = pool.lease([3 * PAGE])
    assert fourth.pages.shape[0] == 3
    assert pool.stats().bytes_reserved == 9 * PAGE_BYTES


def test_limit_error_has_the_numbers_and_the_way_out() -> None:
    pool = make(max_pages=3)
    with pool.lease([2 * PAGE]), pytest.raises(PoolLimitError) as caught:
        pool.lease([2 * PAGE])
    message = str(caught.value)
    for part in (
        f"needs {2 * PAGE_BYTES} bytes",
        f"{2 * PAGE_BYTES} bytes are in use",
        f"limit is {3 * PAGE_BYTES}",
        "raise max_bytes",
        "smaller batch",
    ):
        assert part in message
    assert isinstance(caught.value, MemoryError)
    assert pool.stats().leases == 0
    with pool.lease([3 * PAGE]):  # the idle slab, too small, made room
        assert pool.stats().pages == 3


def test_released_memory_stays_until_trim() -> None:
    pool = make()
    with pool.lease([PAGE]) as lease:
        pool.lease([2 * PAGE]).release()
        assert pool.stats().pages == 3
        pool.trim()
        assert pool.stats().pages == 1
        assert lease.rows().shape == (PAGE, WIDTH)
    assert pool.stats().pages == 1
    pool.trim()
    assert pool.stats().pages == 0


@errors
def test_a_device_with_too_little_for_twice_the_last_slab(small_device: Any, error: type[RuntimeError]) -> None:
    """There are 150 pages left, which are enough."""
    small_device(250, error)
    pool = make()
    with pool.lease([100 * PAGE]), pool.lease([10 * PAGE]) as lease:
        assert lease.pages.shape[0] == 10
        with pool.lease([8 * PAGE]) as third:  # growth goes on from there
            assert third.pages.shape[0] == 20
    assert pool.stats().pages == 130


def test_idle_slabs_make_room_on_a_full_device(small_device: Any) -> None:
    small_device(10)
    pool = make()
    with pool.lease([4 * PAGE]):
        pool.lease([5 * PAGE]).release()
        assert pool.stats().pages == 9
        with pool.lease([6 * PAGE]):
            assert pool.stats().pages == 10


def test_what_fits_below_the_limit_need_not_fit_on_the_device(small_device: Any) -> None:
    small_device(7)
    pool = make(max_pages=9)
    with pool.lease([4 * PAGE]), pool.lease([2 * PAGE]) as lease:
        assert lease.pages.shape[0] == 2


@errors
def test_a_full_device_is_told_in_numbers(small_device: Any, error: type[RuntimeError]) -> None:
    """By the allocator's own error: the pool's limit is not what is short."""
    small_device(8, error)
    pool = make()
    pool.lease([6 * PAGE]).release()
    with pool.lease([3 * PAGE]) as first, pool.lease([PAGE]) as second:
        first.rows().fill_(1.0)
        before = pool.stats()
        with pytest.raises(error) as caught:
            pool.lease([3 * PAGE])
        assert pool.stats() == before
        assert first.rows().sum() == first.rows().numel()
        assert second.table.tolist() == [3]
    for part in (
        FULL[error],
        f"needs {3 * PAGE_BYTES} bytes",
        f"{4 * PAGE_BYTES} bytes are in use",
        f"leases hold {6 * PAGE_BYTES}, and {2 * PAGE_BYTES} of them are free",
        "smaller batch",
    ):
        assert part in str(caught.value)
    assert not isinstance(caught.value, PoolLimitError)
    with pool.lease([8 * PAGE]):  # the others are gone
        assert pool.stats().pages == 8


def test_who_tries_smaller_batches_knows_the_error(small_device: Any) -> None:
    memory = pytest.importorskip("accelerate.utils.memory")
    small_device(2)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        make().lease([3 * PAGE])
    assert memory.should_reduce_batch_size(caught.value)


def test_errors_of_other_kinds_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make()
    pool.device = torch.device("cuda")

    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "empty", broken)
    monkeypatch.setattr("reroute_kernels.pool.stream_on", lambda _: None)
    with pytest.raises(RuntimeError, match=r"encountered$"):
        pool.lease([1])
    assert pool.stats().pages == 0
