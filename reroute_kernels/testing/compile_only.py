"""Compilation without a GPU, watched: launches on a new device, which compile and run nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from triton import knobs
from triton.runtime import driver

from ..triton_kernels.offline import _OfflineDriver

__all__ = ["Compilation", "new_device"]


class Compilation(NamedTuple):
    """A kernel, what tells its specialisations apart, and whether Triton found it in its cache on disk."""

    kernel: str
    key: str
    hit: bool


class _NewDevice(_OfflineDriver):
    """An sm_90 that has not loaded anything in this process."""

    numbers = itertools.count(1000)

    def __init__(self) -> None:
        super().__init__(90)
        self._number = next(self.numbers)

    def get_current_device(self) -> int:
        return self._number


@contextmanager
def new_device() -> Iterator[list[Compilation]]:
    """What is compiled or loaded inside the block; launches take CPU tensors and leave zeros for results."""
    compiled: list[Compilation] = []

    def listen(*, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
        compiled.append(Compilation(metadata["name"], metadata["hash"], cache_hit))

    with ExitStack() as patches:
        for owner, name, stand_in in (
            (driver, "_active", _NewDevice()),
            (knobs.compilation, "listener", listen),
            # Nothing runs, but PyTorch takes results for indices.
            (torch, "empty", torch.zeros),
            (torch.Tensor, "new_empty", torch.Tensor.new_zeros),
        ):
            patches.enter_context(mock.patch.object(owner, name, stand_in, create=True))
        yield compiled
