"""Host integers on their way to a device, the one kind of copy that a prefill makes; and how long they stay there.

Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def upload(integers: Any, device: torch.device) -> Tensor:
    """``integers`` (nested sequences or a numpy array) as int64 on ``device``.

    On CUDA from pinned memory: such a copy is queued, whereas the host may have to wait for one from
    pageable memory. RuntimeError inside a CUDA graph capture: the graph would read host memory that is gone.
    """
    cuda = device.type == "cuda" and type(torch.empty(0)) is Tensor  # a fake tensor is nowhere
    if cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "host integers cannot be uploaded inside a CUDA graph capture: run the prefill once before, in the same "
            "`with handle.using(plan)`"
        )
    staged = torch.tensor(integers, dtype=torch.int64, device="cpu")
    # Pinned afterwards: torch.tensor refuses to pin what comes from numpy.
    return (staged.pin_memory() if cuda else staged).to(device, non_blocking=True)


def has_stream(tensor: Tensor) -> bool:
    """Whether ``tensor`` is on a GPU, and not a fake one."""
    return type(tensor) is Tensor and tensor.is_cuda


def outlive_queue(tensor: Tensor) -> None:
    """Keep the memory of ``tensor`` until all is done that the present CUDA stream has been asked for.

    The allocator knows only of the stream on which a tensor was made, and would hand its memory on too early.
    """
    if has_stream(tensor):
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
