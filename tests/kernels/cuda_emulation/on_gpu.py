"""CPU tensors that say they are on a GPU, for host code that asks only where a tensor is and what its address is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

FACTORIES = "arange", "empty", "full", "ones", "rand", "randn", "tensor", "zeros"


class OnGPU(Tensor):
    """What is made of such a tensor is on its GPU too."""

    place: torch.device

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        places: list[torch.device] = []
        tree_map_only(OnGPU, lambda tensor: places.append(tensor.place), (args, kwargs))
        return tree_map_only(Tensor, lambda tensor: on_gpu(tensor, places[0]), made)


def on_gpu(tensor: Tensor, place: torch.device) -> OnGPU:
    """``tensor`` as one of ``place``, unless it says already where it is."""
    labelled = tensor.as_subclass(OnGPU)
    labelled.place = getattr(tensor, "place", place)
    return labelled


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PyTorch's factories take CUDA devices."""
    for name in FACTORIES:
        monkeypatch.setattr(torch, name, _anywhere(getattr(torch, name)))


def _anywhere(make: Any) -> Any:
    def run(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        place = torch.device(device or "cpu")
        made: Tensor = make(*args, device="cpu", **kwargs)
        return made if place.type == "cpu" else on_gpu(made, place)

    return run
