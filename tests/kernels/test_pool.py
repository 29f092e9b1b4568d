from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import PAGE, PAGE_BYTES, WIDTH, make
from torch._subclasses.fake_tensor import FakeTensorMode

from reroute_kernels import Lease, PagedPool, PoolLimitError
from reroute_kernels.slabs import Slab


def test_layout_of_a_ragged_lease() -> None:
    with make().lease([5, 0, 4, 1]) as lease:
        assert lease.lengths == (5, 0, 4, 1)
        assert lease.starts == (0, 8, 8, 12)
        assert lease.num_rows == 16
        assert lease.table.dtype == torch.int64
        assert lease.table.tolist() == [0, 1, 2, 3]
        assert lease.pages.shape == (4, PAGE, WIDTH)
        assert lease.rows().shape == (16, WIDTH)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_empty_leases_take_nothing(lengths: list[int]) -> None:
    pool = make(max_pages=1)
    with pool.lease(lengths) as lease:
        assert lease.num_rows == 0
        assert lease.rows().shape == (0, WIDTH)
        assert lease.pages.shape[1:] == (PAGE, WIDTH)
        assert lease.table.shape == (0,)
        assert pool.stats().pages == 0
        assert pool.stats().leases == 1
    assert pool.stats().leases == 0


def test_consecutive_rows_are_a_view_of_the_pool() -> None:
    with make().lease([6]) as lease:
        lease.rows().copy_(torch.arange(64.0).view(8, 8))
        assert torch.equal(lease.pages.view(8, 8), torch.arange(64.0).view(8, 8))


def test_fragmented_rows_are_gathered_in_lease_order() -> None:
    pool = make(max_pages=5)
    pool.lease([5 * PAGE]).release()
    held = [pool.lease([PAGE]) for _ in range(5)]
    for index in (3, 0):
        held[index].release()
    with pool.lease([2 * PAGE]) as lease:
        assert lease.table.tolist() == [0, 3]
        lease.pages[0].fill_(1.0)
        lease.pages[3].fill_(2.0)
        assert lease.rows()[:, 0].tolist() == [1.0] * PAGE + [2.0] * PAGE


def test_a_consecutive_run_is_preferred_to_lower_pages() -> None:
    pool = make(max_pages=6)
    pool.lease([6 * PAGE]).release()
    held = [pool.lease([PAGE]) for _ in range(6)]
    for index in (0, 3, 4):
        held[index].release()
    with pool.lease([2 * PAGE]) as pair, pool.lease([PAGE]) as single:
        assert pair.table.tolist() == [3, 4]
        assert single.table.tolist() == [0]


def test_a_slab_with_a_run_is_preferred_to_an_earlier_one() -> None:
    pool = make()
    held = [pool.lease([3 * PAGE])]
    held[0].release()
    first, middle, last = (pool.lease([PAGE]) for _ in range(3))
    second = pool.lease([2 * PAGE])
    first.release()
    last.release()
    second.release()
    with pool.lease([2 * PAGE]) as lease:
        assert lease.pages.shape[0] == 6
        assert lease.table.tolist() == [0, 1]
    middle.release()


def test_tails_are_zero_whatever_the_pages_held() -> None:
    pool = make()
    with pool.lease([8, 8]) as lease:
        lease.pages.fill_(float("nan"))
    with pool.lease([5, 2]) as lease:
        rows = lease.rows()
        assert torch.equal(rows[5:8], torch.zeros(3, WIDTH))
        assert torch.equal(rows[10:12], torch.zeros(2, WIDTH))


def test_a_lease_ends_with_its_block_and_only_once() -> None:
    pool = make()
    lease = pool.lease([PAGE])
    with pytest.raises(KeyError), lease:
        raise KeyError
    lease.release()
    assert pool.stats().pages_in_use == 0
    with pool.lease([PAGE]) as other:
        lease.release()
        assert pool.stats().pages_in_use == 1
        assert other.num_rows == PAGE
    uses: list[Callable[[], object]] = [lambda: lease.pages, lambda: lease.table, lease.rows]
    for use in uses:
        with pytest.raises(RuntimeError, match="was released"):
            use()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"width": 0}, "at least 1"),
        ({"page_size": 0}, "at least 1"),
        ({"max_bytes": 64 * 8 * 4 - 1}, "below one page of 2048 bytes"),
        ({"max_bytes": "256MiB"}, r"such as .* max_bytes=256 << 20\): got .* max_bytes='256MiB'"),
        ({"max_bytes": 2.56e8}, "whole numbers"),
        ({"width": "8"}, "whole numbers .* got width='8'"),
        ({"page_size": None}, "whole numbers"),
        ({"dtype": "float16"}, "torch.dtype, .* dtype='float16'"),
    ],
)
def test_bad_pools_are_refused(arguments: dict[str, Any], match: str) -> None:
    usual: dict[str, Any] = {"width": 8, "dtype": torch.float32, "device": "cpu"}
    with pytest.raises(ValueError, match=match):
        PagedPool(**usual | arguments)


def test_bad_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"negative: got \[3, -1\]"):
        make().lease([3, -1])


def test_shared_is_one_per_key_and_dies_with_its_last_user() -> None:
    pool = PagedPool.shared(24, torch.float32, "cpu")
    assert PagedPool.shared(24, torch.float32, torch.device("cpu")) is pool
    assert PagedPool.shared(24, torch.bfloat16, "cpu") is not pool
    assert PagedPool.shared(25, torch.float32, "cpu") is not pool
    reference = weakref.ref(pool)
    lease = pool.lease([1])
    del pool
    gc.collect()
    assert reference() is PagedPool.shared(24, torch.float32, "cpu")
    lease.release()
    del lease
    gc.collect()
    assert reference() is None


def test_shared_keeps_fake_and_real_slabs_apart() -> None:
    real = PagedPool.shared(24, torch.float32, "cpu")
    with FakeTensorMode():
        assert PagedPool.shared(24, torch.float32, "cpu") is not real
    assert PagedPool.shared(24, torch.float32, "cpu") is real


def test_fake_tensors() -> None:
    with FakeTensorMode():
        pool = PagedPool(WIDTH, torch.bfloat16, "cpu", page_size=PAGE)
        with pool.lease([5, 3]) as lease:
            assert lease.rows().shape == (12, WIDTH)
            assert lease.table.shape == (3,)


def test_a_slab_born_in_inference_mode_can_be_written_outside() -> None:
    pool = make()
    with torch.inference_mode(), pool.lease([3]) as lease:
        lease.rows().fill_(1.0)
    with pool.lease([3]) as lease:
        lease.rows().fill_(2.0)
        assert lease.pages.sum() == 3 * WIDTH * 2.0 + WIDTH * 2.0


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_accounting_under_any_sequence(data: st.DataObject) -> None:
    pool = make(max_pages=12)
    held: list[tuple[Lease, list[int], float]] = []
    peak = 0
    for mark in range(data.draw(st.integers(1, 12))):
        action = data.draw(st.sampled_from(["lease", "lease", "release", "forget", "trim"]))
        if action == "lease":
            lengths = data.draw(st.lists(st.integers(0, 17), min_size=1, max_size=3))
            try:
                held.append((filled(pool, lengths, float(mark)), lengths, float(mark)))
            except PoolLimitError:
                continue
        elif action in ("release", "forget") and held:
            place = data.draw(st.integers(0, len(held) - 1))
            if action == "release":
                held[place][0].release()
            del held[place]
        else:
            pool.trim()
        used = sum(-(-n // PAGE) for _, lengths, _ in held for n in lengths)
        peak = max(peak, used)
        stats = pool.stats()
        assert (stats.pages_in_use, stats.leases, stats.page_size) == (used, len(held), PAGE)
        assert used <= stats.pages <= 12
        assert stats.bytes_in_use == used * PAGE_BYTES
        assert stats.bytes_reserved == stats.pages * PAGE_BYTES
        assert stats.peak_bytes_in_use == peak * PAGE_BYTES
        # Nobody else wrote there.
        assert all(torch.equal(lease.rows(), torch.full((lease.num_rows, WIDTH), value)) for lease, _, value in held)
    held.clear()
    pool.trim()
    assert pool.stats().pages == 0


def filled(pool: PagedPool, lengths: list[int], value: float) -> Lease:
    lease = pool.lease(lengths)
    lease.pages[lease.table] = value
    return lease


def test_threads_never_share_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make()
    errors: list[BaseException] = []
    inside: list[int] = []

    def slowly(method: Callable[..., Any]) -> Callable[..., Any]:
        def alone(*args: Any) -> Any:
            inside.append(threading.get_ident())
            time.sleep(0.001)  # an invitation to the other thread
            assert len(inside) == 1
            inside.pop()
            return method(*args)

        return alone

    for name in ("take", "give_back"):
        monkeypatch.setattr(Slab, name, slowly(getattr(Slab, name)))

    def work(value: float) -> None:
        try:
            for step in range(50):
                with pool.lease([1 + step % 9, 5]) as lease:
                    lease.pages[lease.table] = value
                    assert torch.equal(lease.rows(), torch.full((lease.num_rows, WIDTH), value))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert pool.stats().pages_in_use == pool.stats().leases == 0


def test_a_page_changes_streams_in_order(executor: Any) -> None:
    if executor.kind != "cuda":
        pytest.skip("of a GPU")
    pool = PagedPool(WIDTH, torch.float32, executor.device, page_size=PAGE)
    with torch.cuda.stream(torch.cuda.Stream()), pool.lease([PAGE]) as lease:
        torch.cuda._sleep(100_000_000)
        lease.pages.fill_(1.0)
    with pool.lease([PAGE]) as lease:
        lease.pages.fill_(2.0)
        torch.cuda.synchronize()
        assert torch.equal(lease.rows().cpu(), torch.full((PAGE, WIDTH), 2.0))


def test_pages_do_not_wait_for_their_neighbours(executor: Any) -> None:
    if executor.kind != "cuda":
        pytest.skip("of a GPU; elsewhere see test_pool_streams.py")
    pool, other = PagedPool(WIDTH, torch.float32, executor.device, page_size=PAGE), torch.cuda.Stream()
    pool.lease([4 * PAGE]).release()
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        released, held = (pool.lease([PAGE]) for _ in range(2))
        torch.cuda._sleep(1_000_000_000)
        released.release()
        end = other.record_event()
    with pool.lease([2 * PAGE]) as lease, held:
        assert lease.table.tolist() == [2, 3]  # waits for the current stream
        assert not end.query()
    torch.cuda.synchronize()
