"""Caches that store otherwise than a plain one: static, quantised, offloaded; all of them run on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, QuantizedCache, QuantizedLayer, StaticLayer

__all__ = ["KINDS", "ROOM", "offload_on_cpu"]

ROOM = 96
AWAY = 2.0**40


class Lossless(QuantizedLayer):  # type: ignore[no-untyped-call]
    """A quantiser that loses nothing: what is wrong then is not its rounding. It has a short residual."""

    def __init__(self) -> None:
        super().__init__(residual_length=3)

    def _quantize(self, tensor: Tensor, axis: int = 0) -> tuple[Tensor, float]:
        return tensor.clone() * 2, 0.5

    def _dequantize(self, q_tensor: tuple[Tensor, float]) -> Tensor:
        return q_tensor[0] * q_tensor[1]


def _static(config: Any) -> Any:
    return StaticCache(config=config, max_cache_len=ROOM)


def _quantized(config: Any) -> Any:
    cache = object.__new__(QuantizedCache)
    super(QuantizedCache, cache).__init__(layers=[Lossless() for _ in range(config.num_hidden_layers)])
    return cache


def _offloaded(config: Any) -> Any:
    return DynamicCache(config=config, offloading=True)


def _offloaded_static(config: Any) -> Any:
    return StaticCache(config=config, max_cache_len=ROOM, offloading=True)


KINDS: dict[str, Callable[[Any], Any]] = {
    "static": _static,
    "quantized": _quantized,
    "offloaded": _offloaded,
    "offloaded static": _offloaded_static,
}
"""Each is made of a decoder's configuration; static ones have ``ROOM``."""


class _Stream:
    """In place of CUDA's."""

    def wait_stream(self, other: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass


def offload_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between their updates offloaded layers have other values, which whoever reads them there would notice."""

    def offload(self: Any) -> None:
        if self.is_initialized and not vars(self).get("is_away"):
            self.keys, self.values, self.is_away = self.keys * AWAY, self.values * AWAY, True

    def prefetch(self: Any) -> None:
        if vars(self).pop("is_away", False):
            self.keys, self.values = self.keys / AWAY, self.values / AWAY

    for kind in (DynamicLayer, StaticLayer):
        monkeypatch.setattr(kind, "offload", offload)
        monkeypatch.setattr(kind, "prefetch", prefetch)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: _Stream())
    monkeypatch.setattr(torch, "Stream", _Stream)
