"""What prefills cost, measured where it can be measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch

from .core.cost import ModelShape, prefill_cost
from .core.decision import Decision
from .core.plan import Plan
from .graphs import GraphUse

__all__ = ["LayerRows", "Stats", "Totals", "make_stats"]


@dataclass(frozen=True)
class LayerRows:
    """What a layer of a cache holds after a prefill.

    - ``rows``: as many are stored; ``most`` as many would be at most, of a window.
    - ``room``: how many tokens a static cache has room for, else None. The plain model would allocate as many rows.
    - ``nbytes`` of all that is allocated, ``row_bytes`` of one row, ``element_size`` of one number.
    - ``state_bytes``: of what is kept so that later turns may choose again.
    """

    rows: int
    most: int | None
    room: int | None
    nbytes: int
    row_bytes: int
    element_size: int
    state_bytes: int

    @classmethod
    def of(cls, keys: torch.Size, values: torch.Size, dtype: torch.dtype) -> LayerRows:
        """Of a layer that grows and holds ``keys`` and ``values`` (B, G, T, D) of these shapes, and no more."""
        rows, nbytes = keys[-2], (keys.numel() + values.numel()) * dtype.itemsize
        return cls(rows, None, None, nbytes, nbytes // max(1, rows), dtype.itemsize, 0)


@dataclass(frozen=True)
class Stats:
    """Budget of the last prefill with visual tokens. ``kept`` and ``visual`` are per sample of its batch.

    ``avg_tokens`` is a mean over the samples that have visual tokens.

    FLOPs count two per multiply-add and every pair of a query and a key, those of earlier turns included, over all
    layers and samples, with fillers, without the LM head and the vision tower. ``scoring_flops`` are those of ranking,
    as each ranker counts its own; what one's own ranker does not say is not counted.
    ``prefill_flops_dense`` and ``kv_bytes_dense`` are what the plain model would have run and stored, with no earlier
    turn routed. ``kv_bytes`` is read off the cache after the prefill; without a cache both are 0.
    ``state_bytes`` is what the cache keeps beside keys and values, so that later turns may choose again
    (``reopens=True``). Of a turn that does, all but ``visual`` is of what it ran: no visual token in layers that it
    does not run again. Under tensor parallelism FLOPs are those of all processes together, bytes those of this one.

    Where graphs are on, ``graph`` says whether this prefill was replayed, or why not. Fillers of a graph are in
    ``prefill_flops`` and ``scoring_flops``, and not in the cache.

    ``prefills`` counts those that were recorded so far, this one included.
    """

    method: str
    action: str
    backend: str
    backend_reason: str
    layers: tuple[int, ...] = ()
    visual: tuple[int, ...] = ()
    kept: tuple[tuple[int, ...], ...] = ()
    avg_tokens: float = 0.0
    keep: float = 1.0
    prefill_flops: float = 0.0
    scoring_flops: float = 0.0
    prefill_flops_dense: float = 0.0
    kv_bytes: int = 0
    kv_bytes_dense: int = 0
    state_bytes: int = 0
    layer_lengths: tuple[int, ...] = ()
    prefills: int = 0
    graph: GraphUse | None = None

    def __str__(self) -> str:
        """A few lines for people."""
        head = f"{self.method}, {self.action}, backend {self.backend} ({self.backend_reason})"
        if not self.prefills:
            return f"{head}\n{_NOTHING}"
        counts = zip(self.layers, zip(*self.kept, strict=True), strict=True)
        stages = ", ".join(f"layer {layer}: {_slashed(kept)}" for layer, kept in counts)
        visual = f"visual tokens {_slashed(self.visual)}, kept from {stages}"
        states = (f"states for later turns {self.state_bytes / 2**20:.4g} MiB",) if self.state_bytes else ()
        graph = () if self.graph is None else (str(self.graph),)
        prefills = _counted(self.prefills, "prefill")
        return "\n".join((head, visual, *_costs(self), *states, *graph, f"{prefills} recorded"))


@dataclass(frozen=True)
class Totals:
    """Sums of the ``Stats`` of all prefills so far, and means over their prompts, however these were batched.

    A prompt is a sample that has visual tokens. ``visual`` sums up N over the prompts, ``active`` the visual tokens per
    layer; all other fields are sums of what ``Stats`` calls the same. Without a cache every step of ``generate`` is a
    prefill, and counts.
    """

    prefills: int = 0
    prompts: int = 0
    visual: int = 0
    active: float = 0.0
    prefill_flops: float = 0.0
    scoring_flops: float = 0.0
    prefill_flops_dense: float = 0.0
    kv_bytes: int = 0
    kv_bytes_dense: int = 0

    @property
    def avg_visual(self) -> float:
        """Visual tokens N of a prompt, mean over all prompts."""
        return self.visual / max(1, self.prompts)

    @property
    def avg_tokens(self) -> float:
        """avg_T, mean over all prompts."""
        return self.active / max(1, self.prompts)

    @property
    def keep(self) -> float:
        """The share of all visual tokens that a layer ran."""
        return self.active / self.visual if self.visual else 1.0

    def plus(self, stats: Stats) -> Totals:
        """The totals with one more prefill."""
        prompts = _prompts(stats.visual)
        return Totals(
            prefills=self.prefills + 1,
            prompts=self.prompts + prompts,
            visual=self.visual + sum(stats.visual),
            active=self.active + prompts * stats.avg_tokens,
            prefill_flops=self.prefill_flops + stats.prefill_flops,
            scoring_flops=self.scoring_flops + stats.scoring_flops,
            prefill_flops_dense=self.prefill_flops_dense + stats.prefill_flops_dense,
            kv_bytes=self.kv_bytes + stats.kv_bytes,
            kv_bytes_dense=self.kv_bytes_dense + stats.kv_bytes_dense,
        )

    def __str__(self) -> str:
        """A few lines for people."""
        if not self.prefills:
            return _NOTHING
        prefills, prompts = _counted(self.prefills, "prefill"), _counted(self.prompts, "prompt")
        return "\n".join((f"{prefills} of {prompts}, {self.avg_visual:.1f} visual tokens each", *_costs(self)))


_NOTHING = "no prefill with visual tokens was recorded yet"


def _costs(spent: Stats | Totals) -> tuple[str, ...]:
    ratio = spent.prefill_flops / spent.prefill_flops_dense
    return (
        f"avg_T {spent.avg_tokens:.1f} ({spent.keep:.1%} of all visual tokens, mean over all layers)",
        f"prefill {spent.prefill_flops / 1e9:.4g} GFLOP with scoring ({spent.scoring_flops / 1e9:.3g}); "
        f"dense {spent.prefill_flops_dense / 1e9:.4g}, ratio {ratio:.3f}",
        f"KV cache {spent.kv_bytes / 2**20:.4g} MiB measured; dense {spent.kv_bytes_dense / 2**20:.4g} MiB",
    )


def _counted(count: int, noun: str) -> str:
    """1 prefill, 2 prefills."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _slashed(counts: Sequence[int]) -> str:
    """One count per sample: 576/576/0."""
    return "/".join(map(str, counts))


def _prompts(visual: Sequence[int]) -> int:
    """How many samples have visual tokens."""
    return sum(n > 0 for n in visual)


def make_stats(
    plan: Plan,
    shape: ModelShape,
    names: dict[str, Any],
    cache_layers: Sequence[LayerRows | None],
    *,
    prefills: int,
    graph: Callable[[], GraphUse] | None = None,
    rows: Sequence[int] = (),
) -> Stats:
    """Stats of one prefill.

    Args:
        plan: of the prefill; one that changes nothing ran dense.
        shape: the decoder.
        names: the descriptive fields.
        cache_layers: what the layers of the cache hold after the prefill, None where one holds nothing; none without
            a cache.
        prefills: how many prefills were recorded, this one included.
        graph: says whether a graph was replayed, and ``rows``: those of its class, which ran then.
    """
    # Layers that a later turn does not run again run its own tokens alone.
    again = plan.schedule.first_look if plan.reopened else 0
    layers = range(again, shape.num_layers)
    stages = [-1 if plan.changes_nothing else plan.schedule.stage_of(layer) for layer in layers]
    active = sum(count * sum(plan.active_visual(s)) for s, count in Counter(stages).items()) / shape.num_layers
    width_of = {stage: rows[stage + 1] if rows else plan.width(stage) for stage in set(stages)}
    widths = [*[plan.shape[1]] * again, *(width_of[stage] for stage in stages)]
    # Layers under gradient checkpointing store nothing, and a cache may have fewer layers or more.
    kept = zip_longest(cache_layers[: len(widths)], widths)
    stored = tuple(
        0 if index in shape.recurrent else width if layer is None else layer.rows
        for index, (layer, width) in enumerate(kept)
    )
    is_stored = all(layer is not None or index in shape.recurrent for index, layer in enumerate(cache_layers))
    filled = [layer for layer in cache_layers if layer is not None]
    scoring = 0 if plan.changes_nothing else _scoring_flops(plan, shape, rows)
    routed = prefill_cost(shape, widths, widths if rows else stored, scoring=scoring, batch=plan.batch)
    # Layers before the first routing layer store what they would without routing; later ones what they may at most.
    first, length, total = plan.schedule.layers[0], plan.shape[1], plan.past + plan.length
    most = [total if layer is None or layer.most is None else min(total, layer.most) for layer in cache_layers]
    most = most[: len(widths)]
    all_keys = [*stored[:first], *most[first:], *[total] * (len(widths) - max(first, len(most)))]
    size = filled[0].element_size if filled else 0
    dense = prefill_cost(shape, [length] * len(widths), all_keys, batch=plan.batch, bytes_per_element=size)
    return Stats(
        **names,
        layers=plan.schedule.layers,
        visual=plan.visual_counts,
        kept=tuple(zip(*(decision.k for decision in plan.decisions), strict=True)),
        avg_tokens=active / _prompts(plan.visual_counts),
        keep=active / sum(plan.visual_counts),
        prefill_flops=float(routed.prefill_flops),
        scoring_flops=float(routed.scoring_flops),
        prefill_flops_dense=float(dense.prefill_flops),
        kv_bytes=sum(layer.nbytes for layer in filled),
        kv_bytes_dense=_row_bytes(cache_layers, all_keys) if is_stored else dense.kv_bytes,
        state_bytes=sum(layer.state_bytes for layer in filled),
        layer_lengths=stored,
        prefills=prefills,
        graph=None if graph is None else graph(),
    )


def _row_bytes(layers: Sequence[LayerRows | None], rows: Sequence[int]) -> int:
    """Of caches of so many ``rows`` in each layer, whose heads may differ from layer to layer; None has none."""
    filled = [(layer, count) for layer, count in zip(layers, rows, strict=False) if layer is not None]
    return sum(layer.row_bytes * (count if layer.room is None else layer.room) for layer, count in filled)


def _scoring_flops(plan: Plan, shape: ModelShape, rows: Sequence[int]) -> int:
    """Of all decisions and samples: rows of this prompt only are ranked, whatever the cache holds."""
    flops = 0
    for decision in plan.decisions:
        for row_count, candidates, k in zip(
            _scored_rows(plan, decision, rows), decision.candidates, decision.k, strict=True
        ):
            flops += decision.ranker.flops(shape, row_count, candidates, k)
    for layer, rankers in plan.schedule.looks.items():
        decision = plan.decisions[plan.schedule.next_stage(layer)]
        for row_count, candidates in zip(_scored_rows(plan, decision, rows), decision.candidates, strict=True):
            flops += sum(ranker.note_flops(shape, row_count, candidates) for ranker in rankers)
    return flops


def _scored_rows(plan: Plan, decision: Decision, rows: Sequence[int]) -> Sequence[int]:
    """Of each sample, in a graph of ``rows`` if there are any."""
    if rows:
        return [rows[decision.left_by + 1]] * plan.batch
    return plan.lengths if decision.from_pool else [plan.width(decision.left_by)] * plan.batch
