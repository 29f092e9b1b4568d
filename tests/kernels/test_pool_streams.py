"""Pages, page tables and uploads between CUDA streams, on a stand-in that finds races (``races``)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from races import Gpu, Race, Stream

from reroute_kernels import Lease, PagedPool
from reroute_kernels import pool as pool_module
from reroute_kernels.upload import upload

PAGE = 4
WIDTH = 2


@pytest.fixture
def pool() -> PagedPool:
    return PagedPool(WIDTH, torch.float32, "cpu", page_size=PAGE)


@pytest.fixture
def streams(gpu: Gpu) -> list[Stream]:
    return [gpu.new_stream() for _ in range(3)]


def use(lease: Lease, stream: Stream) -> None:
    """Read and write the pages of ``lease``, as kernels do."""
    with stream.gpu.stream(stream):
        rows = lease.pages.index_select(0, lease.table)
        lease.pages.index_copy_(0, lease.table, rows)


def take(pool: PagedPool, pages: int, stream: Stream) -> Lease:
    """A lease in use on ``stream``; its last page has a tail."""
    with stream.gpu.stream(stream):
        lease = pool.lease([pages * PAGE - 1])
    use(lease, stream)
    return lease


def give(lease: Lease, stream: Stream) -> None:
    with stream.gpu.stream(stream):
        lease.release()


def hand_over(lease: Lease, stream: Stream) -> None:
    with stream.gpu.stream(stream):
        lease.begin_use()
    use(lease, stream)


def test_one_stream_waits_for_nothing(pool: PagedPool, streams: list[Stream]) -> None:
    stream = streams[0]
    for pages in (3, 5, 2, 4):
        first, second = (take(pool, n, stream) for n in (pages, 1))
        give(first, stream)
        give(take(pool, pages, stream), stream)
        give(second, stream)
    assert stream.waits == 0


def test_pages_change_streams_in_order(pool: PagedPool, streams: list[Stream]) -> None:
    for stream in streams * 2:
        give(take(pool, 2, stream), stream)
    assert [stream.waits for stream in streams] == [1, 2, 2]


def test_a_lease_waits_for_its_own_pages_only(pool: PagedPool, streams: list[Stream]) -> None:
    """Not for a prefill that has the page beside them, nor for one that had it."""
    a, b, _ = streams
    give(take(pool, 6, a), a)
    first, second, third, fourth = (take(pool, 1, a) for _ in range(4))
    since = a.now
    for lease in (first, third):
        use(lease, a)
        give(lease, a)
    use(second, a)
    lease = take(pool, 2, b)
    assert lease.table.tolist() == [4, 5]
    assert 0 < b.knows(a.cuda_stream) <= since
    use(fourth, a)
    use(lease, b)


def test_new_pages_may_lie_where_another_stream_still_works(pool: PagedPool, streams: list[Stream]) -> None:
    """A slab is memory of the stream that needed it; others get what that one left."""
    a, b, _ = streams
    held = [take(pool, 1, a) for _ in range(2)]
    assert (pool.stats().pages, len(held)) == (3, 2)
    take(pool, 1, b)
    assert pool.stats().pages == 3


def test_scattered_rows_are_read_without_their_neighbours(pool: PagedPool, streams: list[Stream]) -> None:
    a, b, _ = streams
    give(take(pool, 4, a), a)
    held = [take(pool, 1, a) for _ in range(4)]
    for lease in (held[0], held[3]):
        give(lease, a)
    scattered = take(pool, 2, a)
    assert scattered.table.tolist() == [0, 3]
    hand_over(held[1], b)
    with a.gpu.stream(a):
        scattered.rows()
    use(held[1], b)


def test_a_lease_changes_streams(pool: PagedPool, streams: list[Stream]) -> None:
    a, b, c = streams
    lease = take(pool, 2, a)
    with pytest.raises(Race):
        use(lease, b)
    hand_over(lease, b)
    hand_over(lease, b)
    assert b.waits == 1
    hand_over(lease, c)
    give(lease, c)
    use(take(pool, 2, a), a)
    assert [stream.waits for stream in streams] == [1, 1, 1]


def test_a_use_that_has_ended_is_waited_for_up_to_its_end(pool: PagedPool, streams: list[Stream]) -> None:
    a, b, _ = streams
    lease = take(pool, 1, a)
    with a.gpu.stream(a):
        lease.end_use()
    end = a.now
    take(pool, 1, a)
    hand_over(lease, b)
    assert b.knows(a.cuda_stream) == end


def test_released_on_another_stream_than_used_on(pool: PagedPool, streams: list[Stream]) -> None:
    """As after an interrupt: the next forward, wherever it runs, gives back what the last one held."""
    a, b, c = streams
    lease = take(pool, 2, a)
    use(lease, a)
    give(lease, b)
    take(pool, 2, c)


def test_memory_outlives_the_streams_that_use_it(pool: PagedPool, streams: list[Stream]) -> None:
    """Of slabs and page tables, whichever stream made them: checked where they are given back."""
    a, b, c = streams
    give(take(pool, 2, a), a)
    lease = take(pool, 2, b)
    hand_over(lease, c)
    give(lease, c)
    pool.trim()
    assert pool.stats().pages == 0


def test_a_lease_that_fails_leaves_its_pages_in_order(
    pool: PagedPool, streams: list[Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had begun to clear them."""
    a, b, _ = streams
    give(take(pool, 2, a), a)
    with monkeypatch.context() as patch:
        patch.setattr(pool_module, "upload", lambda *_: pytest.fail("planted"))
        with pytest.raises(pytest.fail.Exception, match="planted"):
            take(pool, 2, b)
    assert (pool.stats().pages_in_use, pool.stats().leases) == (0, 0)
    take(pool, 2, a)
    assert (a.waits, b.waits) == (1, 1)


# --- leases that nobody releases --------------------------------------------------------------------------------------


def test_pages_of_a_forgotten_lease_wait_for_its_stream(pool: PagedPool, streams: list[Stream]) -> None:
    """The collector asks no stream for anything: the one that gets the pages does."""
    a, b, c = streams
    lease = take(pool, 2, a)
    use(lease, a)
    until = a.now
    with c.gpu.stream(c):  # that is where it is collected
        del lease
    assert (a.now, b.waits, c.waits) == (until, 0, 0)
    again = take(pool, 2, b)
    assert (b.waits, c.waits, b.knows(a.cuda_stream)) == (1, 0, until)
    assert pool.stats().leases == 1
    give(again, c)


def test_a_forgotten_lease_whose_use_has_ended(pool: PagedPool, streams: list[Stream]) -> None:
    a, b, _ = streams
    lease = take(pool, 1, a)
    lease.end_use()
    end = a.now
    other = take(pool, 1, a)
    del lease
    again = take(pool, 1, b)
    assert b.knows(a.cuda_stream) == end
    for held, stream in ((other, a), (again, b)):
        give(held, stream)


def test_a_forgotten_lease_that_changed_streams(pool: PagedPool, streams: list[Stream]) -> None:
    a, b, c = streams
    lease = take(pool, 1, a)
    hand_over(lease, b)
    del lease
    give(take(pool, 1, c), c)
    assert c.waits == 1


def test_memory_of_forgotten_leases_outlives_its_streams(pool: PagedPool, streams: list[Stream]) -> None:
    a, b, _ = streams
    give(take(pool, 2, a), a)
    lease = take(pool, 2, b)
    del lease
    pool.trim()
    assert pool.stats().pages == 0


def test_a_lease_forgotten_while_its_stream_is_captured(gpu: Gpu, pool: PagedPool, streams: list[Stream]) -> None:
    """What the stream was asked for before the capture has no mark yet, and can have none before its end."""
    a, b, _ = streams
    lease = take(pool, 2, a)
    with gpu.capture(a):
        del lease
        other = take(pool, 2, b)
        assert pool.stats().leases == 2
    give(other, b)
    assert pool.stats().leases == 0
    give(take(pool, 4, b), b)


# --- captures ---------------------------------------------------------------------------------------------------------


def test_a_replay_is_a_use_of_the_stream_that_releases(gpu: Gpu, pool: PagedPool, streams: list[Stream]) -> None:
    a, b, c = streams
    lease = take(pool, 2, a)
    with gpu.stream(a):
        lease.end_use()
    with gpu.capture() as graph:
        lease.begin_use()
        rows = lease.pages.index_select(0, lease.table)
        lease.pages.index_copy_(0, lease.table, rows)
        lease.end_use()
    with gpu.stream(b):
        graph.replay()
    give(lease, b)
    take(pool, 2, c)
    assert a.waits == 0


def test_a_lease_released_in_a_capture(gpu: Gpu, pool: PagedPool, streams: list[Stream]) -> None:
    """Its event could not be waited for."""
    a, b, _ = streams
    lease = take(pool, 2, a)
    with gpu.capture(a):
        lease.release()
    take(pool, 2, b)


@pytest.mark.parametrize("on", [0, 1])
def test_the_device_of_a_pool_is_asked_whether_it_is_captured(
    gpu: Gpu, pool: PagedPool, monkeypatch: pytest.MonkeyPatch, on: int
) -> None:
    """Not the current device."""
    pool.device = torch.device("cuda", on)
    monkeypatch.setattr(pool, "_find", lambda _: pytest.fail("no refusal"))
    with gpu.capture(gpu.new_stream(on)), gpu.stream(gpu.new_stream(1 - on)):
        with pytest.raises(RuntimeError, match="inside a CUDA graph capture"):
            pool.lease([1])
        pool.device = torch.device("cuda", 1 - on)
        with pytest.raises(pytest.fail.Exception, match="no refusal"):
            pool.lease([1])


# --- uploads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("integers", [[[1, 2], [3, 4]], np.array([[1, 2], [3, 4]])], ids=["lists", "numpy"])
def test_an_upload_to_a_gpu_never_waits(gpu: Gpu, integers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way to a GPU, as far as there is one without a GPU: pinned first, then a copy that is queued."""
    copies, wanted = [], torch.tensor([[1, 2], [3, 4]])

    def to(tensor: torch.Tensor, device: torch.device, *, non_blocking: bool) -> torch.Tensor:
        copies.append((tensor, device.type, non_blocking))
        return tensor

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[0]

    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    assert torch.equal(upload(integers, torch.device("cuda")), wanted)
    ((copied, device, non_blocking),) = copies
    assert copied is pinned[0]
    assert (device, non_blocking) == ("cuda", True)


@pytest.mark.parametrize("on", [0, 1])
def test_no_upload_inside_a_graph_capture(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, on: int) -> None:
    """Of the device that it goes to, which need not be the current one."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda _: pytest.fail("no refusal"))
    with gpu.capture(gpu.new_stream(on)), gpu.stream(gpu.new_stream(1 - on)):
        assert torch.equal(upload([[1, 2]], torch.device("cpu")), torch.tensor([[1, 2]]))
        with pytest.raises(RuntimeError, match="inside a CUDA graph capture"):
            upload([1], torch.device("cuda", on))
        with pytest.raises(pytest.fail.Exception, match="no refusal"):
            upload([1], torch.device("cuda", 1 - on))


# --- any order --------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_sequence(data: st.DataObject) -> None:
    """Leases on three streams that change hands as they like: no race, and no stream waits for itself."""
    with pytest.MonkeyPatch.context() as patch:
        gpu = Gpu()
        gpu.install(patch)
        with gpu.watching():
            sequence(data, [gpu.new_stream() for _ in range(3)])


def sequence(data: st.DataObject, streams: list[Stream]) -> None:
    pool = PagedPool(WIDTH, torch.float32, "cpu", page_size=PAGE)
    held: list[list[Any]] = []
    for _ in range(data.draw(st.integers(1, 20))):
        action = data.draw(st.sampled_from(["lease", "lease", "use", "hand over", "end", "release", "forget", "trim"]))
        stream = data.draw(st.sampled_from(streams))
        if action == "lease":
            held.append([take(pool, data.draw(st.integers(1, 5)), stream), stream])
        elif action == "trim":
            pool.trim()
        elif held:
            place = data.draw(st.integers(0, len(held) - 1))
            lease, owner = held[place]
            if action == "use":
                use(lease, owner)
            elif action == "hand over":
                hand_over(lease, stream)
                held[place][1] = stream
            elif action == "end":
                lease.end_use()
                hand_over(lease, owner)
            else:
                if action == "release":
                    give(lease, stream)
                del held[place], lease  # now, and not when there is another
