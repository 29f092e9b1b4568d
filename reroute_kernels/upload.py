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
    staged = torch.tensor(integers, dtype=torch.int64, device="cpu")
    # Pinned afterwards: torch.tensor refuses to pin what comes from numpy.
    return (staged if stream is None else staged.pin_memory()).to(device, non_blocking=True)
