"""Capturing prefills in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from transformers import masking_utils

from reroute_kernels.testing.cuda_graph import captured

__all__ = ["captured_prefill"]


def captured_prefill(run: Callable[[], Any]) -> Callable[[], Any]:
    """``run``, a prefill without an attention mask, as a CUDA graph of the kernels that it runs eagerly."""
    with _no_mask_of_its_own():
        return captured(run)


@contextmanager
def _no_mask_of_its_own() -> Iterator[None]:
    """Transformers 5.17 makes a causal mask while it is captured, even where it was given no mask.

    Eagerly it makes none, and attention is flash attention: other bits, and far less time for long prompts.
    """
    is_tracing = masking_utils.is_tracing  # type: ignore[attr-defined]

    def is_tracing_mask(mask: torch.Tensor | None = None) -> bool:
        return mask is not None and is_tracing(mask)

    with mock.patch.object(masking_utils, "is_tracing", is_tracing_mask):
        yield
