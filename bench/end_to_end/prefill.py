"""Prefill: time of a routed one over that of a dense one, and what part of it is routing itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

import torch

import reroute
from reroute.core.prefill import Prefill
from reroute.handle import Handle
from reroute.transformers import ModelAdapter, Router, context, entrances
from reroute.transformers.planner import Planner
from reroute_kernels import PagedPool, reference

from .interleaved import Parts, Spread, interleaved
from .models import SCHEDULE, Size, build, inputs_of, twin

__all__ = ["PrefillResult", "RoutingShare", "measure"]

ENTRANCES, KEYS, RESTORE, PREFILL = "entrances", "key projection", "restore", "prefill"

# Where the parts of routing are in the code. Whatever is not listed is charged to the part that calls it.
METHODS: tuple[tuple[Any, str, str], ...] = (
    (Router, "open", ENTRANCES),
    (Router, "finish", ENTRANCES),
    (entrances, "enter_layer", ENTRANCES),
    (entrances, "leave_layer", ENTRANCES),
    (Planner, "plan_call", "plan"),
    (Handle, "_home_of", "index tables"),
    (Prefill, "__init__", "index tables"),
    (PagedPool, "lease", "lease"),
    (Prefill, "decide", "index bookkeeping"),
    (Prefill, "advance", "index bookkeeping"),
    (Prefill, "restore", RESTORE),
    (ModelAdapter, "project_own", ENTRANCES),
    (context.RoutedPrefill, "_make_stage", "stage arguments, masks"),
    (context.RoutedPrefill, "finish", "cache bookkeeping"),
    (Handle, "_done", "stats"),
)
OPERATIONS = {
    "defer": "defer",
    "admit": "admit",
    "defer_rmsnorm": "norm of pool rows",
    "select": "top-k",
    "score_topk": "scores",
}
LAYER = (("self_attn.q_proj", "query row"), ("self_attn.k_proj", KEYS))


@dataclass(frozen=True)
class RoutingShare:
    """What reroute does in a prefill besides the decoder layers, in shares of the routed prefill.

    ``share`` (wall clock) and ``cpu_share`` leave out the key projection of scoring, which ``keys`` gives. ``parts``
    are medians of milliseconds: wall clock, CPU time.
    """

    share: Spread
    cpu_share: Spread
    keys: Spread
    parts: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class PrefillResult:
    """Ratios are routed over dense; ``flops_ratio`` is what the FLOP model says, scoring included.

    ``layers_ratio`` is that of the decoder layers alone, called on as many rows without any routing: what short
    sequences cost on this machine, and the least that a routed prefill can take.
    """

    visual: int
    ratio: Spread
    cpu_ratio: Spread
    layers_ratio: Spread
    flops_ratio: float
    dense_ms: float
    routed_ms: float
    routing: RoutingShare

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        return asdict(self)


def measure(size: Size, rounds: int) -> PrefillResult:
    """Measure prompts of one length on a model of its own."""
    plain, inputs = build(size), inputs_of(size)
    routed = twin(plain)
    with torch.no_grad(), reroute.enable(routed, schedule=SCHEDULE) as handle:
        times = interleaved(lambda: plain(**inputs), lambda: routed(**inputs), rounds)
        stats = handle.stats()
    return PrefillResult(
        visual=size.visual,
        ratio=times.ratio,
        cpu_ratio=times.cpu_ratio,
        layers_ratio=_layers_alone(plain, stats.layer_lengths, rounds),
        flops_ratio=stats.prefill_flops / stats.prefill_flops_dense,
        dense_ms=1e3 * Spread.of(times.plain).median,
        routed_ms=1e3 * Spread.of(times.routed).median,
        routing=_routing_share(routed, inputs, rounds),
    )


def _layers_alone(model: Any, lengths: Sequence[int], rounds: int) -> Spread:
    decoder = model.model.language_model
    rows = {n: torch.randn(1, n, decoder.config.hidden_size) for n in set(lengths)}
    tables = {n: decoder.rotary_emb(x, torch.arange(n)[None]) for n, x in rows.items()}

    def run(lengths: Sequence[int]) -> None:
        for layer, n in zip(decoder.layers, lengths, strict=True):
            layer(rows[n], attention_mask=None, position_embeddings=tables[n])

    with torch.no_grad():
        return interleaved(lambda: run([lengths[0]] * len(lengths)), lambda: run(lengths), rounds).ratio


def _routing_share(model: Any, inputs: dict[str, Any], rounds: int) -> RoutingShare:
    """Prefills with a clock around everything that reroute is made of."""
    parts, whole = Parts(ENTRANCES, undivided=(RESTORE,)), Parts(PREFILL)
    wall: list[dict[str, float]] = []
    cpu: list[dict[str, float]] = []
    with ExitStack() as patches, torch.no_grad():
        _put_clocks(patches, parts)
        handle = patches.enter_context(reroute.enable(model, schedule=SCHEDULE))
        clocks = {name: parts.wrap(getattr(handle.backend, name), part) for name, part in OPERATIONS.items()}
        handle.backend = replace(handle.backend, **clocks)
        for index in SCHEDULE.layers:
            for path, part in LAYER:
                module = model.model.language_model.layers[index].get_submodule(path)
                patches.enter_context(mock.patch.object(module, "forward", parts.wrap(module.forward, part)))
        run = whole.wrap(model, PREFILL)
        for _ in range(rounds + 1):
            for clock in (parts.wall, parts.cpu, whole.wall, whole.cpu):
                clock.clear()
            run(**inputs)
            wall.append({**parts.wall, **whole.wall})
            cpu.append({**parts.cpu, **whole.cpu})
    del wall[0], cpu[0]  # the first one warmed up
    medians = {name: (_milliseconds(wall, name), _milliseconds(cpu, name)) for name in wall[0]}
    return RoutingShare(
        share=Spread.of([_own(sample) / sample[PREFILL] for sample in wall]),
        cpu_share=Spread.of([_own(sample) / sample[PREFILL] for sample in cpu]),
        keys=Spread.of([sample[KEYS] / sample[PREFILL] for sample in wall]),
        parts=dict(sorted(medians.items(), key=lambda item: -item[1][0])),
    )


def _milliseconds(samples: list[dict[str, float]], part: str) -> float:
    return 1e3 * Spread.of([sample[part] for sample in samples]).median


def _own(sample: dict[str, float]) -> float:
    return sum(seconds for part, seconds in sample.items() if part not in (PREFILL, KEYS))


def _put_clocks(patches: ExitStack, parts: Parts) -> None:
    inner = (("rotate", "RoPE"), ("select", "top-k"), ("defer", "defer"))  # what other operations call
    steps = [(reference, name, part) for name, part in inner]
    for owner, name, part in (*METHODS, *steps):
        function: Callable[..., Any] = getattr(owner, name)
        patches.enter_context(mock.patch.object(owner, name, parts.wrap(function, part)))
