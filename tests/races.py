"""A stand-in for the streams of a GPU that finds races. Tests get it from the fixture ``gpu``.

Operations run at once, in the order of the host. What a GPU is free to do in another order is found by vector clocks:
two operations on the same memory, one of which writes, must follow one another on one stream, or an event that was
recorded after the first must have been waited for before the second. All orders that a GPU may choose are judged
together, so that no test depends on luck.

Memory is handed out and taken back as by PyTorch's allocator. A new tensor may lie where the work of its stream still
reads and writes. A dead one goes back to the stream that made it, and what other streams do with it must be known by
then, from an event or from ``record_stream``.

Operations in a capture only count when it is replayed. Events cannot cross the border of a capture, as on CUDA.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, finalize

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import reroute.core.plan_tensors
import reroute_kernels.pool

Clock = dict[int, int]
"""Of each stream, how many of its operations are done."""

CELL = 4
"""Bytes that are watched as one."""

BY_ROWS = {"index_select": 2, "index_copy_": 2, "index": 1}
"""Operations that use some rows of their first argument only, and which argument says what rows."""

WAITING = ("equal", "_local_scalar_dense")
"""Operations whose result the host waits for."""


class Race(AssertionError):
    """A GPU might have done it in another order."""


class Stream:
    """As much of ``torch.cuda.Stream`` as the product uses. Nothing here makes the host wait."""

    def __init__(self, gpu: Gpu, device: int) -> None:
        self.gpu, self.device, self.cuda_stream = gpu, torch.device("cuda", device), gpu.number()
        self.clock: Clock = {self.cuda_stream: 0}
        self.graph: Graph | None = None
        self.waits = 0

    def __repr__(self) -> str:
        return f"stream {self.cuda_stream}"

    @property
    def now(self) -> int:
        """How many operations it was asked for."""
        return self.clock[self.cuda_stream]

    def knows(self, other: int) -> int:
        """How many operations of the stream ``other`` are done before the next of this one."""
        return max(self.clock.get(other, 0), self.gpu.host.get(other, 0))

    def record_event(self) -> Event:
        return Event(self, dict(self.clock), self.graph)

    def wait_event(self, event: Event) -> None:
        if event.graph is not self.graph:
            raise RuntimeError("CUDA error: an event crosses the border of a capture")
        self.waits += 1
        for stream, count in event.clock.items():
            self.clock[stream] = max(self.clock.get(stream, 0), count)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


@dataclass(eq=False)
class Event:
    """What is done when ``stream`` has come this far."""

    stream: Stream
    clock: Clock
    graph: Graph | None


class Memory:
    """Which streams used the memory of a tensor, and when."""

    def __init__(self, size: int, home: Stream | Graph | None) -> None:
        """``size`` in bytes. ``home``: what it was made by, if it is not older than the watch."""
        cells = -(-size // CELL)
        self.home, self.is_dead = home, False
        self.recorded: set[int] = set()
        self._last: Clock = {}
        self._writer, self._written = np.zeros((2, cells), dtype=np.int64)
        self._read: dict[int, Any] = {}

    def use(self, what: str, stream: Stream, cells: Any, writes: bool) -> None:
        """Race if another stream may not have done with ``cells`` yet, or the memory is gone."""
        if self.is_dead:
            raise Race(f"{what} on {stream} uses memory that was given back")
        me = stream.cuda_stream
        for other in self._last.keys() - {me}:
            times = np.where(self._writer[cells] == other, self._written[cells], 0)
            if writes and other in self._read:
                times = np.maximum(times, self._read[other][cells])
            if times.max(initial=0) > stream.knows(other):
                raise Race(f"{what} on {stream} may come before what stream {other} does there")
        if writes:
            self._writer[cells], self._written[cells] = me, stream.now
        else:
            self._read.setdefault(me, np.zeros_like(self._written))[cells] = stream.now
        self._last[me] = stream.now

    def die(self) -> None:
        """Go back. The memory of a graph stays with the graph."""
        self.is_dead = not isinstance(self.home, Graph)
        if isinstance(self.home, Stream):
            for stream in self._last.keys() - self.recorded - {self.home.cuda_stream}:
                if self._last[stream] > self.home.knows(stream):
                    self.home.gpu.faults.append(f"memory goes back to {self.home} while stream {stream} may use it")


Use = tuple[Memory, Any, bool]
"""Memory, which of its cells, and whether they are written."""


@dataclass(eq=False)
class Graph:
    """What was captured."""

    gpu: Gpu
    uses: list[Use] = field(default_factory=list)

    def replay(self) -> None:
        """On the current stream."""
        self.gpu.launch("a replay", self.uses)


class Gpu:
    """Two devices. Each thread has a current one, and a current stream on each."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.host: Clock = {}
        """What the host has waited for."""
        self._asked: Clock = {}
        self._numbers = iter(range(1, 1 << 20))
        self._lock = threading.RLock()
        self._memory: WeakKeyDictionary[Any, Memory] = WeakKeyDictionary()
        self._defaults = [self.new_stream(device) for device in (0, 1)]
        self._here = threading.local()

    def number(self) -> int:
        return next(self._numbers)

    def new_stream(self, device: int = 0) -> Stream:
        return Stream(self, device)

    def current_stream(self, device: torch.device | None = None) -> Stream:
        here: dict[Any, Any] = vars(self._here)
        index: int = here.get("device", 0) if device is None or device.index is None else device.index
        stream: Stream = here.get(index, self._defaults[index])
        return stream

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """Make ``stream`` and its device the current ones."""
        here: dict[Any, Any] = vars(self._here)
        before = dict(here)
        here.update({"device": stream.device.index, stream.device.index: stream})
        try:
            yield
        finally:
            here.clear()
            here.update(before)

    def synchronize(self) -> None:
        """Wait for all that was asked for."""
        self.host.update(self._asked)

    @contextmanager
    def capture(self, stream: Stream | None = None) -> Iterator[Graph]:
        """As ``torch.cuda.graph``, which waits for the device first, and has a stream of its own if it gets none."""
        self.synchronize()
        stream = self.new_stream() if stream is None else stream
        stream.graph = graph = Graph(self)
        try:
            with self.stream(stream):
                yield graph
        finally:
            stream.graph = None

    def launch(self, what: str, uses: Iterable[Use]) -> None:
        """Do something on the current stream, or capture it."""
        stream = self.current_stream()
        if stream.graph is not None:
            stream.graph.uses.extend(uses)
            return
        with self._lock:
            self._asked[stream.cuda_stream] = stream.clock[stream.cuda_stream] = stream.now + 1
            for memory, cells, writes in uses:
                memory.use(what, stream, cells, writes)
            if what in WAITING:
                self.host.update({other: stream.knows(other) for other in stream.clock})

    def memory_of(self, tensor: Tensor, is_new: bool = False) -> Memory:
        storage, stream = tensor.untyped_storage(), self.current_stream()
        with self._lock:
            if storage not in self._memory:
                home = (stream.graph or stream) if is_new else None
                memory = self._memory[storage] = Memory(storage.nbytes(), home)
                finalize(storage, memory.die)
            return self._memory[storage]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what the present thread does."""
        with Watch(self):
            yield
        assert not self.faults, self.faults

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Take the place of CUDA: all real tensors are on the current device."""
        patch.setattr(torch.cuda, "current_stream", self.current_stream)
        patch.setattr(torch.cuda, "stream", self.stream)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.current_stream().graph is not None)
        patch.setattr(Tensor, "record_stream", lambda t, stream: self.memory_of(t).recorded.add(stream.cuda_stream))
        for module in (reroute_kernels.pool, reroute.core.plan_tensors):
            patch.setattr(module, "stream_of", lambda t: self.current_stream() if type(t) is Tensor else None)
            patch.setattr(module, "upload", self._upload)

    def _upload(self, integers: Any, device: torch.device) -> Tensor:
        assert self.current_stream().graph is None, "an upload cannot be captured"
        return torch.tensor(integers, dtype=torch.int64).clone()


class Watch(TorchDispatchMode):
    """Tells a ``Gpu`` of every operation."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not func.is_view:
            name = func.overloadpacket.__name__
            uses = list(self._given(name, func._schema.arguments, args, kwargs))
            given = {tensor.untyped_storage() for tensor in tensors((args, kwargs))}
            made = [tensor for tensor in tensors(out) if tensor.untyped_storage() not in given]
            uses += [(self._gpu.memory_of(tensor, is_new=True), cells(tensor), True) for tensor in made]
            self._gpu.launch(name, uses)
        return out

    def _given(self, name: str, arguments: Any, args: Any, kwargs: Any) -> Iterator[Use]:
        for place, argument in enumerate(arguments):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            rows = args[BY_ROWS[name]] if place == 0 and name in BY_ROWS else None
            rows = None if isinstance(rows, list | tuple) and rows[0] is None else rows  # of columns, not of rows
            for tensor in tensors(args[place] if place < len(args) else kwargs.get(argument.name)):
                yield self._gpu.memory_of(tensor), cells(tensor, rows), writes


def tensors(values: Any) -> list[Tensor]:
    """Those that have memory."""
    return [value for value in tree_leaves(values) if isinstance(value, Tensor) and value.numel()]


def cells(tensor: Tensor, rows: Any = None) -> Any:
    """Where in its memory ``tensor`` lies, or just ``rows`` of it: an index, or a list of one."""
    size, start = tensor.element_size(), tensor.storage_offset()
    width = tensor.stride(0) * size // CELL if tensor.ndim else 0
    if rows is not None and len(tensors(rows)) == 1 and tensor.is_contiguous() and width:
        (index,) = tensors(rows)
        first = start * size // CELL + index.reshape(-1).numpy() * width
        return (first[:, None] + np.arange(width)).ravel()
    span = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return slice(start * size // CELL, -(-(start + span) * size // CELL))
