"""Order between CUDA streams. The host never waits here.

Tensors change hands on the host, which runs ahead of the device. On one stream the work follows the order of the calls.
A stream that takes over memory from another one has to wait for what that one was asked to do with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Mark:
    """A place in the queue of a CUDA stream; ``stream`` is its handle."""

    stream: int
    event: torch.cuda.Event


def stream_of(tensor: Tensor) -> torch.cuda.Stream | None:
    """The current stream of the GPU that holds ``tensor``; None for fake tensors and for those on other devices."""
    if type(tensor) is Tensor and tensor.is_cuda:
        return torch.cuda.current_stream(tensor.device)
    return None


def stream_on(device: torch.device) -> torch.cuda.Stream | None:
    """The stream that new tensors on ``device`` would have."""
    if device.type == "cuda" and type(torch.empty(0)) is Tensor:
        return torch.cuda.current_stream(device)
    return None


def is_capturing(stream: torch.cuda.Stream | None) -> bool:
    """Whether the work of ``stream`` now goes into a CUDA graph instead of its queue."""
    if stream is None:
        return False
    if stream == torch.cuda.current_stream():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.stream(stream):  # PyTorch asks the current stream of the current device only
        return torch.cuda.is_current_stream_capturing()


def mark(stream: torch.cuda.Stream | None) -> Mark | None:
    """The present end of the queue of ``stream``; None without a stream.

    None in a capture too. Its work is not in the queue, and an event of it cannot be waited for outside the graph.
    """
    if stream is None or is_capturing(stream):
        return None
    return Mark(stream.cuda_stream, stream.record_event())


def queue_behind(marks: Iterable[Mark | None], stream: torch.cuda.Stream) -> None:
    """Let the later work of ``stream`` wait for ``marks``; those of its own queue cost nothing.

    In a capture nothing is waited for. CUDA refuses to wait for events from before the capture, and what has to come
    later are the replays. ``torch.cuda.graph`` synchronises the device before it captures, so that earlier work is
    done. A caller of ``CUDAGraph.capture_begin`` has to queue the replays behind the work that was not captured.
    """
    foreign = [mark for mark in marks if mark is not None and mark.stream != stream.cuda_stream]
    if foreign and not is_capturing(stream):
        for mark in foreign:
            stream.wait_event(mark.event)
