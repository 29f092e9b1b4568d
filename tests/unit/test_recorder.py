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
from reroute.graphs.recorder import check_device
from reroute_kernels import recorder
from reroute_kernels.recorder import CannotRecordNow, CudaRecorder

GPU = torch.device("cuda", 0)
RESERVED_BY_A_RUN = 10


class Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class Generator:
    """Of random numbers: nobody draws from a state while a capture has it."""

    def __init__(self, state: dict[str, bool] | None = None) -> None:
        self.state = {"is captured": False} if state is None else state

    def graphsafe_get_state(self) -> Generator:
        return Generator(self.state)

    def graphsafe_set_state(self, other: Generator) -> None:
        self.state = other.state

    def clone_state(self) -> Generator:
        return Generator(dict(self.state))


class Pytorch:
    """What ``torch.cuda`` of PyTorch 2.11 keeps while runs are recorded, and does not put right by itself."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.stream = self.caller = Stream("caller", self.log)
        self.generator = Generator()
        self.taken_from: list[Any] = []
        self.uses: dict[Any, int] = {}
        self.streams, self.reserved, self.gives_up = 0, 100, False
        pytorch = self

        class MemPool:
            """As in PyTorch it lives until nobody holds it, whatever becomes of the graphs that were captured in it."""

            def __init__(self) -> None:
                self.id = 0, len(pytorch.uses)
                pytorch.uses[self.id] = 1

        class CUDAGraph:
            def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
                pytorch.log.append(f"capture on {pytorch.stream.name}, {capture_error_mode}")
                if pool in pytorch.taken_from:
                    raise RuntimeError("already recording to mempool_id")
                self.pool, self.state = pool, pytorch.generator.state
                pytorch.taken_from.append(pool)
                pytorch.uses[pool] += 1
                self.state["is captured"] = True

            def capture_end(self) -> None:
                if pytorch.gives_up:
                    raise RuntimeError("operation failed due to a previous error during capture")
                pytorch.end(0, self.pool)
                self.state["is captured"] = False
                pytorch.log.append("captured")

            def replay(self) -> None:
                pytorch.log.append(f"replay on {pytorch.stream.name}")

        self.MemPool, self.CUDAGraph = MemPool, CUDAGraph

    def end(self, device: int, pool: Any) -> None:
        if pool not in self.taken_from:
            raise RuntimeError("not currently recording to mempool_id")
        self.taken_from.remove(pool)

    def release(self, device: int, pool: Any) -> None:
        self.uses[pool] -= 1

    def cuStreamCreate(self, made: Any, flags: Any) -> int:  # as CUDA's driver names it
        assert flags.value == 1, "waits for the default stream"
        assert self.log.pop() == "context"
        self.streams += 1
        made._obj.value = self.streams
        return 0

    def external(self, pointer: int, device: torch.device) -> Stream:
        return Stream(f"side {pointer}", self.log)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def use_mem_pool(self, pool: Any, device: torch.device) -> Iterator[None]:
        self.taken_from.append(pool.id)
        try:
            yield
        finally:
            self.end(0, pool.id)

    def empty_cache(self) -> None:
        assert not self.taken_from
        self.log.append("empty")

    def run(self) -> None:
        self.log.append(f"run on {self.stream.name} in {self.taken_from}")
        self.reserved += RESERVED_BY_A_RUN


@pytest.fixture
def pytorch(monkeypatch: pytest.MonkeyPatch) -> Pytorch:
    its = Pytorch()
    for name, value in {
        "ExternalStream": its.external,
        "current_stream": lambda device: its.stream,
        "stream": its.on,
        "CUDAGraph": its.CUDAGraph,
        "MemPool": its.MemPool,
        "use_mem_pool": its.use_mem_pool,
        "device": lambda device: nullcontext(),
        "mem_get_info": lambda device: its.log.append("context"),
        "memory_reserved": lambda device: its.reserved,
        "synchronize": lambda: its.log.append("wait"),
        "empty_cache": its.empty_cache,
        "default_generators": (its.generator,),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", its.end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", its.release, raising=False)
    monkeypatch.setattr(recorder, "_ABANDONED", [])
    monkeypatch.setattr(recorder, "_driver", lambda: its)
    return its


def test_rehearsals_and_records_are_on_a_stream_and_in_memory_of_their_own(pytorch: Pytorch) -> None:
    its = CudaRecorder(GPU)
    its.rehearse(pytorch.run)
    assert pytorch.log == ["wait", "empty", "run on side 1 in [(0, 0)]", "caller waits for side 1"]
    pytorch.log.clear()
    replays = [its.record(pytorch.run) for _ in range(2)]
    recorded = ["capture on side 1, thread_local", "run on side 1 in [(0, 0)]", "captured"]
    assert pytorch.log == ["wait", "empty", *recorded] * 2
    assert its.nbytes == 3 * RESERVED_BY_A_RUN
    assert pytorch.uses == {(0, 0): 3}  # of both graphs, and held: a handle means nothing once no graph has it
    pytorch.log.clear()
    replays[0]()
    assert pytorch.log == ["replay on caller"]


def test_others_draw_random_numbers_during_a_capture(pytorch: Pytorch) -> None:
    def run() -> None:
        assert not pytorch.generator.state["is captured"]

    state = pytorch.generator.state
    CudaRecorder(GPU).record(run)
    assert pytorch.generator.state is state


@pytest.mark.parametrize("what_fails", ["run", "end", "run and end"])
def test_a_capture_that_fails_leaves_nothing_behind(pytorch: Pytorch, what_fails: str) -> None:
    """PyTorch 2.11 would leave the stream, the pool from which memory is taken, and a random state of no use."""
    its = CudaRecorder(GPU)

    def fail() -> None:
        pytorch.gives_up = "end" in what_fails
        if "run" in what_fails:
            raise RuntimeError("not permitted when the stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted" if "run" in what_fails else "previous error"):
        its.record(fail)
    pytorch.gives_up = False
    assert (pytorch.stream, pytorch.taken_from) == (pytorch.caller, [])
    assert not pytorch.generator.state["is captured"]
    pytorch.log.clear()
    its.rehearse(pytorch.run)
    its.record(pytorch.run)
    assert pytorch.log[-1] == "captured"
    number = 2 if "end" in what_fails else 1
    assert f"run on side {number} in [(0, {number - 1})]" in pytorch.log
    assert len(recorder._ABANDONED) == number - 1
    if number == 2:
        assert pytorch.uses[0, 0] == 1  # that of the object


def test_a_rehearsal_that_fails(pytorch: Pytorch) -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        CudaRecorder(GPU).rehearse(fail)
    assert (pytorch.stream, pytorch.taken_from) == (pytorch.caller, [])
    assert pytorch.log[-1] == "caller waits for side 1"  # which may still write to what the caller reads


def test_memory_is_given_back(pytorch: Pytorch) -> None:
    """A pool keeps what a rehearsal has freed for as long as it is held."""
    its = CudaRecorder(GPU)
    its.rehearse(pytorch.run)
    assert its.nbytes == RESERVED_BY_A_RUN
    pytorch.log.clear()
    its.give_back()
    assert (its.nbytes, pytorch.log) == (0, ["empty"])
    its.rehearse(pytorch.run)
    assert "run on side 2 in [(0, 1)]" in pytorch.log


def test_others_that_keep_a_recording_from_beginning(pytorch: Pytorch, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    its = CudaRecorder(GPU)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", refuse)
        for run in (its.rehearse, its.record):
            with pytest.raises(CannotRecordNow, match="not permitted"):
                run(pytorch.run)
    its.record(pytorch.run)
    assert pytorch.log[-1] == "captured"


def test_a_stream_that_cannot_be_made(pytorch: Pytorch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytorch, "cuStreamCreate", lambda made, flags: 2)
    with pytest.raises(RuntimeError, match="cuStreamCreate returns 2"):
        CudaRecorder(GPU)


def test_only_devices_with_a_recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    check_device(GPU)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "expandable_segments:True,max_split_size_mb:512")
            with pytest.raises(RerouteError, match="Take max_split_size_mb out of"):
                check_device(GPU)
    with pytest.raises(RerouteError, match="the decoder is on mps"):
        check_device(torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    with pytest.raises(RerouteError, match="Take backend:cudaMallocAsync out of it"):
        check_device(GPU)


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
