"""The stand-in for a GPU's streams notices what may go wrong on a GPU, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from races import Gpu, Race, Stream, Watch

Operation = Callable[[torch.Tensor], Any]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """One whose faults are for the test to look at."""
    gpu = Gpu()
    gpu.install(monkeypatch)
    with Watch(gpu):
        yield gpu


@pytest.fixture
def streams(gpu: Gpu) -> tuple[Stream, Stream]:
    return gpu.new_stream(), gpu.new_stream()


@pytest.mark.parametrize(
    ("first", "then", "is_race"),
    [
        (lambda t: t.zero_(), lambda t: t.zero_(), True),
        (lambda t: t.zero_(), lambda t: t + 1, True),
        (lambda t: t + 1, lambda t: t.zero_(), True),
        (lambda t: t + 1, lambda t: t + 1, False),
        (lambda t: t[:2].zero_(), lambda t: t[1:].sum(), True),
        (lambda t: t[:2].zero_(), lambda t: t[2:].sum(), False),
        (lambda t: t.index_copy_(0, torch.tensor([0, 2]), torch.ones(2, 3)), lambda t: t[2] + 1, True),
        (lambda t: t.index_copy_(0, torch.tensor([0, 2]), torch.ones(2, 3)), lambda t: t[1] + 1, False),
        (lambda t: t[1].zero_(), lambda t: t[torch.tensor([0, 1])], True),
        (lambda t: t[1].zero_(), lambda t: t[torch.tensor([0, 2])], False),
    ],
)
def test_two_operations_without_an_event(
    gpu: Gpu, streams: tuple[Stream, Stream], first: Operation, then: Operation, is_race: bool
) -> None:
    a, b = streams
    shared = torch.ones(4, 3)
    gpu.synchronize()
    with gpu.stream(a):
        first(shared)
        first(shared)
    with gpu.stream(b):
        if is_race:
            with pytest.raises(Race):
                then(shared)
        else:
            then(shared)
            then(shared)


def test_events_order_what_came_before_them(gpu: Gpu, streams: tuple[Stream, Stream]) -> None:
    a, b = streams
    with gpu.stream(a):
        early, late = torch.ones(2), torch.ones(2)
        event = a.record_event()
        late.zero_()
    b.wait_event(event)
    with gpu.stream(b):
        early.zero_()
        with pytest.raises(Race):
            late.zero_()
    gpu.current_stream().wait_stream(b)
    early.sum()  # what b waited for is behind it too


def test_new_memory_may_be_in_use_on_the_stream_that_made_it(gpu: Gpu, streams: tuple[Stream, Stream]) -> None:
    a, b = streams
    with gpu.stream(a):
        empty = torch.empty(4)
    with gpu.stream(b), pytest.raises(Race):
        empty.zero_()


@pytest.mark.parametrize("told", ["not at all", "by an event", "by record_stream"])
def test_memory_that_another_stream_uses(gpu: Gpu, streams: tuple[Stream, Stream], told: str) -> None:
    a, b = streams
    with gpu.stream(a):
        tensor = torch.ones(4)
    b.wait_stream(a)
    with gpu.stream(b):
        tensor.sum()
    if told == "by an event":
        a.wait_stream(b)
    if told == "by record_stream":
        tensor.record_stream(cast(Any, b))
    assert not gpu.faults
    del tensor
    assert bool(gpu.faults) == (told == "not at all")


def test_a_replay_is_where_captured_work_is_done(gpu: Gpu, streams: tuple[Stream, Stream]) -> None:
    a, b = streams
    with gpu.stream(a):
        tensor = torch.ones(4)
    with gpu.capture() as graph:
        (tensor + 1).sum()
    with gpu.stream(a):
        tensor.zero_()
    with gpu.stream(b), pytest.raises(Race):
        graph.replay()
    b.wait_stream(a)
    with gpu.stream(b):
        graph.replay()
    with gpu.stream(a), pytest.raises(Race):
        tensor.zero_()
    gpu.synchronize()
    del tensor
    with pytest.raises(Race, match="given back"):
        graph.replay()


def test_events_do_not_cross_the_border_of_a_capture(gpu: Gpu) -> None:
    outside = gpu.new_stream().record_event()
    with gpu.capture():
        inside = gpu.current_stream().record_event()
        with pytest.raises(RuntimeError, match="CUDA error"):
            gpu.current_stream().wait_event(outside)
    with pytest.raises(RuntimeError, match="CUDA error"):
        gpu.new_stream().wait_event(inside)
