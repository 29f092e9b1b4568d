"""Run one model in several ways and measure what each costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

import reroute

from ..report import Cost, Setup

if TYPE_CHECKING:
    from ..handle import Handle
    from ..stats import Totals

__all__ = ["costs", "routed"]

Inputs = Mapping[str, Any]


@contextmanager
def routed(model: Any, setup: Setup, backend: str, *, trace: bool = False) -> Iterator[Handle | None]:
    """The model as ``setup`` says; yields None for dense."""
    if setup.method is None:
        yield None
        return
    with _enable(model, setup, backend, trace=trace) as handle:
        yield handle


def _enable(model: Any, setup: Setup, backend: str, *, trace: bool = False) -> Handle:
    """Route as ``setup`` says; dense is a routing that keeps everything."""
    handle: Handle = reroute.enable(model, config=setup.config(backend, trace=trace))
    return handle


def costs(
    model: Any,
    prompts: Sequence[Inputs],
    setups: Sequence[Setup],
    backend: str,
    *,
    rounds: int,
    limit_s: float = float("inf"),
    progress: Callable[[int], object] = lambda done: None,
) -> list[Cost]:
    """Time prefills of every prompt, all setups in turn in each round, so that a busy moment hits all alike.

    ``setups[0]`` is dense. Another round before these warms up and counts. ``progress`` is told how many prefills were
    done. After ``limit_s`` seconds no further round is begun.
    """
    deadline = time.perf_counter() + limit_s
    counted = [_count(model, prompts, setup, backend, progress) for setup in setups]
    seconds: list[list[float]] = [[] for _ in setups]
    for inputs in prompts:
        for done in range(rounds):
            if done and time.perf_counter() > deadline:
                break
            for setup, own in zip(setups, seconds, strict=True):
                with routed(model, setup, backend):
                    own.append(_prefill(model, inputs))
                progress(1)
    return [_cost(totals, own, seconds[0]) for totals, own in zip(counted, seconds, strict=True)]


def _count(
    model: Any, prompts: Sequence[Inputs], setup: Setup, backend: str, progress: Callable[[int], object]
) -> Totals:
    """What the prompts cost."""
    with _enable(model, setup, backend) as handle:
        for inputs in prompts:
            _prefill(model, inputs)
            progress(1)
    return handle.totals()


def _prefill(model: Any, inputs: Inputs) -> float:
    """Seconds of one prefill, vision tower included."""
    _wait(model.device)
    start = time.perf_counter()
    with torch.no_grad():
        model(**inputs, use_cache=True, logits_to_keep=1)
    _wait(model.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cost(totals: Totals, seconds: list[float], dense_seconds: list[float]) -> Cost:
    return Cost(
        visual=totals.avg_visual,
        avg_tokens=totals.avg_tokens,
        flops=totals.prefill_flops / totals.prompts,
        kv_bytes=totals.kv_bytes / totals.prompts,
        seconds=median(seconds),
        time_ratio=median(own / reference for own, reference in zip(seconds, dense_seconds, strict=True)),
    )
