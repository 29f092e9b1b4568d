"""Host integers on their way to a device, the one kind of copy that a prefill makes. It never waits for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .streams import is_capturing, stream_on


def upload(integers: Any, device: torch.device) -> Tensor:
    """``integers`` (nested sequences or a numpy array) as int64 on ``device``.

    On CUDA from pinned memory: such a copy is queued, whereas the host may have to wait for one from
    pageable memory. The tensor belongs to the current stream of ``device``: another stream has to wait for the copy.

    Raises:
        RuntimeError: inside a CUDA graph capture. The graph would read host memory that is gone.
    """
    stream = stream_on(device)
    if is_capturing(stream):
        raise RuntimeError(
            "host integers cannot be uploaded inside a CUDA graph capture: run the prefill once before, in the same "
            "`with handle.using(plan)`"
        )
    return _staged(integers, stream).to(device, non_blocking=True)


def upload_to(target: Tensor, integers: Any) -> None:
    """``upload`` to ``target``, an int64 tensor that is there already: what a graph reads.

    Each call stages in memory of its own, which PyTorch gives to nobody else before the copy is done.
    """
    target.copy_(_staged(integers, stream_on(target.device)), non_blocking=True)


def _staged(integers: Any, stream: torch.cuda.Stream | None) -> Tensor:
    """On the host, as int64; pinned for a copy on ``stream``."""
    staged = torch.tensor(integers, dtype=torch.int64, device="cpu")
    # Pinned afterwards: torch.tensor refuses to pin what comes from numpy.
    return staged if stream is None else staged.pin_memory()
