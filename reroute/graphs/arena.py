"""Memory that the graphs of one device share, and their turns: one runs at a time, and its results are copied out."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from reroute_kernels.streams import Mark, mark, queue_behind, stream_on

from .recorder import RECORDERS

if TYPE_CHECKING:
    from .store import GraphStore

__all__ = ["Arena", "Layout"]

ALIGNMENT = 256
"""Bytes, as of memory of PyTorch's allocator on CUDA: kernels are specialised on less."""

Layout = Sequence[tuple[tuple[int, ...], torch.dtype]]
"""Shapes and dtypes of tensors that lie one behind the other."""


class Arena:
    """Inputs, outputs and homes of the graphs of one device lie here, those of each from the beginning on.

    So nothing in it outlives a turn (``turn``), and ``memory`` is as large as the largest graph needs, or little more.
    A graph reads the memory that it was captured with: where it has to grow, all of the ``stores`` let go of theirs.
    """

    _shared: ClassVar[weakref.WeakValueDictionary[torch.device, Arena]] = weakref.WeakValueDictionary()
    _shared_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, device: torch.device) -> None:
        """Empty. KeyError if nothing can be recorded on ``device``."""
        self.device = device
        self.recorder = RECORDERS[device.type](device)
        self.memory = torch.empty(0, dtype=torch.uint8, device=device)
        self.stores: weakref.WeakSet[GraphStore[Any]] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._last: Mark | None = None

    @classmethod
    def shared(cls, device: torch.device) -> Arena:
        """The process's arena on ``device``; it goes with its last user."""
        with cls._shared_lock:
            arena = cls._shared.get(device)
            if arena is None:
                arena = cls._shared[device] = cls(device)
            return arena

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Have the arena to oneself, on the current stream of the device: behind all that others have asked it for."""
        with self._lock:
            stream = stream_on(self.device)
            if stream is not None:
                queue_behind([self._last], stream)
            try:
                yield
            finally:
                self._last = mark(stream)

    def wait(self) -> None:
        """Until the device has done what it was asked for in this turn."""
        stream = stream_on(self.device)
        if stream is not None:
            stream.synchronize()

    def views(self, layout: Layout) -> list[torch.Tensor]:
        """Tensors of ``layout``. What is in them is what the turn before has left."""
        sizes = [prod(shape) * dtype.itemsize for shape, dtype in layout]
        places = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        if sum(places) > self.memory.numel():
            self._grow(sum(places))
        pieces = self.memory[: sum(places)].split(places)
        return [
            piece[:size].view(dtype).view(shape)
            for piece, size, (shape, dtype) in zip(pieces, sizes, layout, strict=True)
        ]

    def _grow(self, nbytes: int) -> None:
        """To ``nbytes``, or a quarter more than there was: a class is seldom the last one that is larger."""
        least = max(nbytes, self.memory.numel() * 5 // 4)
        self.wait()
        for store in list(self.stores):
            store.let_go()
        self.memory = self.memory.new_empty(0)  # old and new memory need not be there together
        with torch.inference_mode(False):  # what was born in it could not be written outside it later
            self.memory = torch.empty(least, dtype=torch.uint8, device=self.device)

    def give_back(self) -> None:
        """Hold nothing, so that others have the memory: all of the ``stores`` let go of their graphs."""
        self.wait()
        for store in list(self.stores):
            store.let_go()
        self.memory = self.memory.new_empty(0)
        self.recorder.give_back()

    def lend(self, *others: torch.Tensor) -> None:
        """Keep ``memory``, and ``others``, for what the current stream is asked to do with it."""
        stream = stream_on(self.device)
        if stream is not None:
            for tensor in (self.memory, *others):
                tensor.record_stream(stream)

    @property
    def nbytes(self) -> int:
        """Of ``memory``, and what recording has reserved."""
        return self.memory.numel() + self.recorder.nbytes
