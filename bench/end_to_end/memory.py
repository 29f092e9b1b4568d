"""Memory: peak of live bytes of a dense and of a routed prefill, and what routing adds to it. Counted, not sampled."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import reroute
from reroute.core.plan import Plan, make_plan
from reroute.core.prefill import Prefill
from reroute.transformers import calls, entrances
from reroute.transformers.context import RoutedPrefill
from reroute_kernels import PagedPool

from .memory_log import LiveBytes, Span
from .models import IMAGE_ID, SCHEDULE, Size, build, inputs_of

__all__ = ["MemoryResult", "Scratch", "count"]

PACKAGES = ("reroute", "reroute_kernels")
AROUND = (calls.__name__, entrances.__name__)
"""Modules of theirs that call the model's own code."""
INTEGERS = 8 * 8
"""Bytes per row for position ids, indices and the like: eight int64."""


@dataclass(frozen=True)
class Scratch:
    """The costliest decision: bytes that it needs on top of what is live before it, and its largest tensor."""

    bytes: int
    largest: int
    largest_by: str


@dataclass(frozen=True)
class MemoryResult:
    """Bytes, without parameters and inputs.

    - ``extra``: by how much routing raises the peak over the most that Transformers itself holds (the decoder's output
      counted in, which routing puts together again). At most ``promised``: ``pool``, one ``compact`` copy of the
      running rows, and ``tables``, what goes with each row of the two: cos, sin and some integers.
    - ``held``: the most that routing holds while layers run.
    - ``attention``: what one fp32 tensor of H x L x L elements would take, which scoring must never make.
    """

    model: str
    length: int
    dense_peak: int
    routed_peak: int
    peak_at: str
    extra: int
    held: int
    pool: int
    compact: int
    tables: int
    scratch: Scratch
    attention: int

    @property
    def promised(self) -> int:
        """The most that ``extra`` may be."""
        return self.pool + self.compact + self.tables

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        return {**asdict(self), "promised": self.promised}


def count(model: str, size: Size, dtype: torch.dtype = torch.float32, *, fake: bool = False) -> MemoryResult:
    """Count one prefill of each kind. ``fake``: without data, so that models of any size can be counted."""
    ids = inputs_of(size)["input_ids"].numpy()
    plan = make_plan(ids, ids >= 0, (IMAGE_ID,), SCHEDULE, "route")
    assert plan is not None
    with FakeTensorMode() if fake else nullcontext(), torch.no_grad():
        network = build(size, dtype)
        inputs = {"inputs_embeds": torch.zeros(1, size.length, size.hidden, dtype=dtype)}
        dense, routed = LiveBytes(), LiveBytes(PACKAGES, AROUND)
        with dense:
            network(**inputs, use_cache=True, logits_to_keep=1)
        pool = PagedPool(size.hidden, dtype, "cpu")  # of its own: born and counted in this prefill
        with (
            _spans(routed),
            reroute.enable(network, schedule=SCHEDULE, pool=pool) as handle,
            routed,
            handle.using(plan),
        ):
            network(**inputs, use_cache=True, logits_to_keep=1)
    return _result(model, size, dtype, plan, dense, routed, pool.stats().bytes_reserved)


def _spans(live: LiveBytes) -> ExitStack:
    """Note when routing itself runs, when it decides and when it puts the output together."""
    patches = ExitStack()
    for owner, name in ((RoutedPrefill, "before_layer"), (Prefill, "decide"), (Prefill, "restore")):
        patches.enter_context(mock.patch.object(owner, name, live.spanned(name, getattr(owner, name))))
    return patches


def _result(
    model: str, size: Size, dtype: torch.dtype, plan: Plan, dense: LiveBytes, routed: LiveBytes, pool: int
) -> MemoryResult:
    live, routing = routed.timeline(), routed.timeline(lambda a: bool(a.owner))
    decisions, (restore,) = routed.spans["decide"], routed.spans["restore"]
    peak, width = max(live), max(map(plan.width, range(len(plan.decisions))))
    layers_own = routed.timeline(lambda a: not a.owner or (restore.contains(a.born) and a.died > restore.end))
    in_layers = {tick for span in routed.spans["before_layer"] for tick in range(span.start + 1, span.end + 1)}
    return MemoryResult(
        model=model,
        length=size.length,
        dense_peak=max(dense.timeline()),
        routed_peak=peak,
        peak_at=routed.at(live.index(peak)).where,
        extra=peak - max(layers_own),
        held=max(total for tick, total in enumerate(routing[: restore.start + 1]) if tick not in in_layers),
        pool=pool,
        compact=width * size.hidden * dtype.itemsize,
        tables=(size.length + width) * (2 * (size.hidden // size.heads) * dtype.itemsize + INTEGERS),
        scratch=max((_scratch(routed, live, span) for span in decisions), key=lambda s: s.bytes),
        attention=4 * size.heads * size.length**2,
    )


def _scratch(routed: LiveBytes, live: list[int], span: Span) -> Scratch:
    largest = max((a for a in routed.log if span.contains(a.born)), key=lambda a: a.bytes)
    return Scratch(max(live[span.start : span.end + 1]) - live[span.start], largest.bytes, largest.where)
