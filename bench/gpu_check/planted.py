"""A launch that writes beyond its tensor: ``python -m bench.gpu_check.planted``. A tool must find this fault."""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl

from .day import NOTHING_RUN

__all__ = ["launch", "main"]

SIZE = 512  # elements


@triton.jit  # type: ignore[untyped-decorator]
def planted_score_kernel(out, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Its name is one that a sanitizer looks for."""
    tl.store(out + tl.arange(0, SIZE), 1)


def launch(device: torch.device) -> None:
    """Twice as many elements as there are."""
    planted_score_kernel[(1,)](torch.zeros(SIZE, dtype=torch.int32, device=device), 2 * SIZE)


def main() -> int:
    """The exit status."""
    if not torch.cuda.is_available():
        print(f"it needs a CUDA device, and torch {torch.__version__} finds none")
        return NOTHING_RUN
    launch(torch.device("cuda"))
    torch.cuda.synchronize()
    print("nothing stopped it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
