"""Recording what a run asks of a GPU as a CUDA graph. A recording that fails leaves PyTorch as it was."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

__all__ = ["CannotRecordNow", "CudaRecorder"]

Run = Callable[[], None]

_ABANDONED: list[torch.cuda.CUDAGraph] = []
"""Graphs whose captures CUDA refused to end. PyTorch's allocator of pinned memory goes on asking them for ever."""


_NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING: work on the default stream does not wait for such a stream, nor break its captures."""


class CannotRecordNow(RuntimeError):
    """A recording could not begin, for what others do on the GPU: another capture, say. It may later."""


class CudaRecorder:
    """CUDA graphs of the GPU ``device``. They share one memory pool, so one of them may run at a time.

    To rehearse and to record waits for the device.

    ``torch.cuda.graph`` is not used: after a capture that fails, its stream stays the current one, memory is looked for
    in its pool, and nobody can draw random numbers any more (PyTorch 2.11).
    """

    def __init__(self, device: torch.device) -> None:
        """Nothing is recorded yet."""
        self._device, self._nbytes = device, 0
        self._begin_anew()

    @property
    def nbytes(self) -> int:
        """Of the memory that all graphs share: what PyTorch has reserved while they were recorded."""
        return self._nbytes

    def give_back(self) -> None:
        """Hold no memory any more. Nothing that was recorded may be left.

        What a rehearsal or a capture that failed has freed stays in the pool, where PyTorch finds it for nobody else,
        also when it runs out of memory.
        """
        self._begin_anew()
        self._nbytes = 0
        with suppress(RuntimeError):  # another capture runs: its end will do
            torch.cuda.empty_cache()

    def rehearse(self, run: Run) -> None:
        """Do ``run`` as it will be recorded, in the memory that the graph will use.

        What is made on first use is made now, and cuBLAS takes a workspace from that memory. Of any other the graph
        would not know when it is freed, as all workspaces are where compiled functions become CUDA graphs (such as the
        decoding steps of Transformers).
        """
        caller = torch.cuda.current_stream(self._device)
        try:
            with self._alone(), torch.cuda.use_mem_pool(self._pool, self._device):
                run()
        finally:
            caller.wait_stream(self._stream)

    def record(self, run: Run) -> Callable[[], None]:
        """What does again all that ``run`` asks the GPU for, on the same memory, on the then current stream.

        Other threads may go on meanwhile: what they do is not recorded.

        Raises:
            Exception: that of ``run``, or RuntimeError of CUDA, which refuses what cannot be in a graph.
        """
        graph = torch.cuda.CUDAGraph()
        with self._alone():
            self._capture(graph, run)
        return graph.replay

    def _capture(self, graph: torch.cuda.CUDAGraph, run: Run) -> None:
        try:
            with self._random_state_apart():
                graph.capture_begin(self._pool.id, capture_error_mode="thread_local")
            run()
        except BaseException:
            with suppress(RuntimeError):  # it says less than what has failed
                self._end(graph)
            raise
        self._end(graph)

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        """End the capture of ``graph``. If CUDA has given it up, PyTorch ends nothing, and its pool is of no use."""
        try:
            graph.capture_end()
        except RuntimeError:
            _ABANDONED.append(graph)
            with suppress(RuntimeError):  # memory was not, or is no longer, taken from the pool
                torch._C._cuda_endAllocateToPool(self._device.index, self._pool.id)
                torch._C._cuda_releasePool(self._device.index, self._pool.id)
            self._begin_anew()
            raise

    def _begin_anew(self) -> None:
        """With another pool and stream. The pool is held, for a handle of it would die with its last graph."""
        with torch.cuda.device(self._device):
            self._pool: Any = torch.cuda.MemPool()
            self._stream = _new_stream(self._device)

    @contextmanager
    def _random_state_apart(self) -> Iterator[None]:
        """Let the capture that begins take a copy of the random state for its own.

        What it takes nobody else can draw from until it ends, or ever if it fails. No prefill draws from it.
        """
        generator = torch.cuda.default_generators[self._device.index]
        state = generator.graphsafe_get_state()
        generator.graphsafe_set_state(generator.clone_state())
        try:
            yield
        finally:
            generator.graphsafe_set_state(state)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """On the stream of recordings, behind all other work, with all memory that is free."""
        with torch.cuda.device(self._device):
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()  # PyTorch gives no memory back to CUDA while it is looked for in one pool
            except RuntimeError as error:
                raise CannotRecordNow(str(error)) from error
        before = torch.cuda.memory_reserved(self._device)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            self._nbytes += max(0, torch.cuda.memory_reserved(self._device) - before)


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    """One that is nobody else's, for as long as the process lives.

    PyTorch has 32 of a priority and hands them out in turn: what another thread does on the one that is captured would
    become a part of the graph.
    """
    torch.cuda.mem_get_info(device)  # any call by which PyTorch makes the device's context that of this thread
    driver, stream = _driver(), ctypes.c_void_p()
    error = driver.cuStreamCreate(ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
    if error:
        raise RuntimeError(f"CUDA makes no stream on {device}: cuStreamCreate returns {error}")
    return torch.cuda.ExternalStream(stream.value, device=device)


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
