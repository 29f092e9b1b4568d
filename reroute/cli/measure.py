"""Run one model in several ways and measure what each costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import torch

import reroute

from ..report import Cost, Setup

if TYPE_CHECKING:
    from ..handle import Handle
    from ..stats import Stats

__all__ = ["costs", "routed"]

Inputs = Mapping[str, Any]


@contextmanager
def routed(model: Any, setup: Setup, backend: str, *, trace: bool = False) -> Iterator[Handle | None]:
    """The model as ``setup`` says; yields None for dense."""
    if setup.method is None:
        yield None
        return
    with reroute.enable(
        model, method=setup.method, action=setup.action, keep=setup.keep, backend=backend, trace=trace
    ) as handle:
        yield handle


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

    ``setups[0]`` is dense and at least one other is not. ``progress`` is told how many prefills were done. After
    ``limit_s`` seconds no further round is begun.
    """
    seconds: list[list[float]] = [[] for _ in setups]
    stats: list[list[Stats]] = [[] for _ in setups]
    deadline = time.perf_counter() + limit_s
    for inputs in prompts:
        for done in range(rounds + 1):  # the first round warms up and counts
            if done > 1 and time.perf_counter() > deadline:
                break
            for i, setup in enumerate(setups):
                with routed(model, setup, backend) as handle:
                    elapsed = _prefill(model, inputs)
                if done:
                    seconds[i].append(elapsed)
                elif handle is not None:
                    stats[i].append(handle.stats())
                progress(1)
    return [
        _cost(setup, own, stats[i] or stats[-1], seconds[0])
        for i, (setup, own) in enumerate(zip(setups, seconds, strict=True))
    ]


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


def _cost(setup: Setup, seconds: list[float], stats: list[Stats], dense_seconds: list[float]) -> Cost:
    dense = setup.method is None
    visual = fmean(sum(s.visual) for s in stats)
    return Cost(
        visual=visual,
        avg_tokens=visual if dense else fmean(s.avg_tokens for s in stats),
        flops=fmean(s.prefill_flops_dense if dense else s.prefill_flops for s in stats),
        kv_bytes=fmean(s.kv_bytes_dense if dense else s.kv_bytes for s in stats),
        seconds=median(seconds),
        time_ratio=median(own / reference for own, reference in zip(seconds, dense_seconds, strict=True)),
    )
