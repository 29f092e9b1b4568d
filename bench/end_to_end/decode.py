"""Decode: one step of a routed model on its routed cache, against the plain model on equally short caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import DynamicCache

import reroute

from .interleaved import Spread, interleaved
from .models import CACHE, SCHEDULE, Size, build, inputs_of, twin

__all__ = ["DecodeResult", "measure"]


@dataclass(frozen=True)
class DecodeResult:
    """Ratios are routed over plain; ``lengths`` are those of the cache's layers when decoding begins."""

    visual: int
    lengths: tuple[int, ...]
    ratio: Spread
    cpu_ratio: Spread
    plain_ms: float

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        return asdict(self)


def measure(size: Size, rounds: int) -> DecodeResult:
    """Let both models write token after token, in alternation, on caches that grow alike.

    Raises:
        RuntimeError: the two models disagree, so that they cannot have done the same work.
    """
    plain, inputs = build(size), inputs_of(size)
    routed = twin(plain)
    with torch.no_grad(), reroute.enable(routed, schedule=SCHEDULE):
        cache = routed(**inputs)[CACHE]
        copied = _copy(cache)
        lengths = tuple(layer.keys.shape[-2] for layer in cache.layers)
        steps = _steps(plain, copied, size.length), _steps(routed, cache, size.length)
        if not torch.equal(steps[0](), steps[1]()):
            raise RuntimeError("the routed and the plain decode step differ on the same cache")
        times = interleaved(*steps, rounds)
    return DecodeResult(size.visual, lengths, times.ratio, times.cpu_ratio, 1e3 * Spread.of(times.plain).median)


def _copy(cache: Any) -> DynamicCache:
    """An ordinary cache that holds the same tensors, layer by layer."""
    copied = DynamicCache()
    for index, layer in enumerate(cache.layers):
        copied.update(layer.keys.clone(), layer.values.clone(), index)
    return copied


def _steps(model: Any, cache: Any, length: int) -> Callable[[], torch.Tensor]:
    """A function that runs one more token and returns its logits."""
    position = torch.tensor([[length - 1]])
    token = torch.ones(1, 1, dtype=torch.int64)

    def step() -> torch.Tensor:
        position.add_(1)
        out = model(input_ids=token, position_ids=position, use_cache=True, **{CACHE: cache})
        logits: torch.Tensor = out.logits
        return logits

    return step
