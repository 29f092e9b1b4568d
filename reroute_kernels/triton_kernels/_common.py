"""What the score and select launches share on the host: counts on the device, and scratch memory."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from reroute_kernels.reference import Segments

CACHED_COUNTS = 1024


@dataclass(frozen=True)
class _Upload:
    """Counts on their way to the device. The queued copy reads ``host`` later, so both live equally long."""

    host: Tensor
    device: Tensor
    stream: int
    done: torch.cuda.Event | None


_recent: OrderedDict[tuple[Segments, torch.device], _Upload] = OrderedDict()
_captured: dict[tuple[Segments, torch.device], _Upload] = {}
_scratch: dict[tuple[str, torch.device, int], Tensor] = {}


def device_counts(segments: Segments, device: torch.device) -> Tensor:
    """The five columns of ``segments`` as (5, B) int32 on ``device``, uploaded once per value without a sync.

    A tensor and not kernel arguments, for which Triton would compile anew wherever a count is 1 or a
    multiple of 16. RuntimeError if a graph capture meets a value that no step has used before.
    """
    key = (segments, device)
    upload = _captured.get(key) or _recent.get(key)
    if upload is None:
        if _capturing(device):
            raise RuntimeError("these segments are new: run the step once before its CUDA graph is captured")
        upload = _recent[key] = _upload(segments, device)
        if len(_recent) > CACHED_COUNTS:
            _recent.popitem(last=False)
    elif _capturing(device):
        _captured[key] = upload  # the graph keeps the address, so this entry is never evicted
    elif upload.done is not None and upload.stream != _stream(device):
        stream = torch.cuda.current_stream(device)
        stream.wait_event(upload.done)
        upload.device.record_stream(stream)
    return upload.device


def scratch(name: str, size: int, dtype: torch.dtype, device: torch.device, *, zero: bool = False) -> Tensor:
    """At least ``size`` elements that this stream reuses in every step; ``zero``: zeros when new.

    A graph that is being captured gets memory of its own, as it may be replayed beside any stream.
    """
    allocate = torch.zeros if zero else torch.empty
    if _capturing(device):
        return allocate(size, dtype=dtype, device=device)
    key = (name, device, _stream(device))
    memory = _scratch.get(key)
    if memory is None or memory.numel() < size:
        memory = _scratch[key] = allocate(1 << max(size - 1, 1).bit_length(), dtype=dtype, device=device)
    return memory


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of ``device``; an H100's where there is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _upload(segments: Segments, device: torch.device) -> _Upload:
    columns = (segments.starts, segments.lengths, segments.candidates, segments.texts, segments.keep)
    cuda = device.type == "cuda"
    host = torch.tensor(columns, dtype=torch.int32, pin_memory=cuda)
    counts = host.to(device, non_blocking=True)
    done = torch.cuda.current_stream(device).record_event() if cuda else None
    return _Upload(host, counts, _stream(device), done)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0
