"""What the CUDA recorder asks PyTorch for, without a GPU; and the turns of an arena."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from tape_recorder import record_on_tapes

from reroute.errors import RerouteError
from reroute.graphs import Arena
from reroute.graphs.recorder import CudaRecorder, check_device

GPU = torch.device("cuda", 0)


class Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class MemPool:
    """As in PyTorch it lives until nobody holds it, whatever becomes of the graphs that were captured in it."""

    id = "one pool"


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of ``torch.cuda``; captures reserve 10 bytes each."""
    log: list[str] = []
    caller = Stream("caller", log)
    reserved = [100]

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        log.append(f"on {stream.name}")
        yield
        log.append(f"off {stream.name}")

    @contextmanager
    def graph(its: Any, *, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        log.append(f"capture in {pool} on {stream.name}, {capture_error_mode}")
        yield
        reserved[0] += 10
        log.append("captured")

    class CUDAGraph:
        def replay(self) -> None:
            log.append("replay")

    for name, value in {
        "Stream": lambda device: Stream("side", log),
        "current_stream": lambda device: caller,
        "stream": on,
        "graph": graph,
        "CUDAGraph": CUDAGraph,
        "MemPool": MemPool,
        "device": lambda device: nullcontext(),
        "memory_reserved": lambda device: reserved[0],
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return log


def test_rehearsals_and_records_are_on_a_stream_of_their_own(log: list[str]) -> None:
    recorder = CudaRecorder(GPU)
    recorder.rehearse(lambda: log.append("run"))
    assert log == ["side waits for caller", "on side", "run", "off side", "caller waits for side"]
    log.clear()
    replays = [recorder.record(lambda: log.append("run")) for _ in range(2)]
    assert log == ["capture in one pool on side, thread_local", "run", "captured"] * 2
    assert recorder.nbytes == 20
    log.clear()
    replays[0]()
    assert log == ["replay"]
    assert isinstance(recorder._pool, MemPool)  # not its name alone, which means nothing once no graph has it


def test_only_devices_with_a_recorder() -> None:
    check_device(GPU)
    with pytest.raises(RerouteError, match="the decoder is on mps"):
        check_device(torch.device("mps"))


def test_an_arena_is_one_memory_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    record_on_tapes(monkeypatch)
    arena = Arena.shared(torch.device("cpu"))
    assert Arena.shared(torch.device("cpu")) is arena
    small = arena.views([((3, 5), torch.float32), ((7,), torch.int64), ((0, 4), torch.bfloat16)])
    assert [(its.shape, its.dtype) for its in small] == [
        ((3, 5), torch.float32),
        ((7,), torch.int64),
        ((0, 4), torch.bfloat16),
    ]
    assert (small[1].data_ptr() - small[0].data_ptr()) % 256 == 0
    assert arena.nbytes == 512
    (large,) = arena.views([((300,), torch.float32)])
    assert large.data_ptr() != small[0].data_ptr()
    assert arena.nbytes == 1280
    (again,) = arena.views([((4,), torch.float16)])
    assert again.data_ptr() == large.data_ptr()
    assert not again.is_inference()
    arena.views([((1281,), torch.uint8)])
    assert arena.nbytes == 1600  # a quarter more, for the next one


def test_one_turn_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    record_on_tapes(monkeypatch)
    arena, order = Arena.shared(torch.device("cpu")), list[str]()
    inside = threading.Event()

    def other() -> None:
        inside.wait()
        with arena.turn():
            order.append("second")

    def broken_off() -> None:
        with arena.turn():
            inside.set()
            thread.join(0.05)
            order.append("first")
            raise RuntimeError("broken off")

    thread = threading.Thread(target=other)
    thread.start()
    with pytest.raises(RuntimeError, match="broken off"):
        broken_off()
    thread.join()
    assert order == ["first", "second"]
