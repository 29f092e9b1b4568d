"""What the last routed prefill cost, measured where it can be measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .budget import ModelShape, kv_bytes, prefill_flops, scoring_flops
from .plan import Plan

__all__ = ["Stats", "make_stats"]


@dataclass(frozen=True)
class Stats:
    """Budget of the last routed prefill of a handle. ``kept`` and ``visual`` are per sample of its batch.

    FLOPs count two per multiply-add, over all layers and samples, with fillers, without the LM head and the vision
    tower. ``kv_bytes`` is read off the cache after the prefill (0 without a cache); ``kv_bytes_dense`` is what the
    plain model would have stored.
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
    layer_lengths: tuple[int, ...] = ()
    prefills: int = 0

    def __str__(self) -> str:
        """A few lines for people."""
        head = f"{self.method}, {self.action}, backend {self.backend} ({self.backend_reason})"
        if not self.prefills:
            return f"{head}\nno prefill was routed yet"
        counts = zip(self.layers, zip(*self.kept, strict=True), strict=True)
        stages = ", ".join(f"layer {layer}: {_slashed(kept)}" for layer, kept in counts)
        ratio = self.prefill_flops / self.prefill_flops_dense
        return "\n".join(
            (
                head,
                f"visual tokens {_slashed(self.visual)}, kept from {stages}",
                f"avg_T {self.avg_tokens:.1f} ({self.keep:.1%} of all visual tokens, mean over all layers)",
                f"prefill {self.prefill_flops / 1e9:.4g} GFLOP with scoring ({self.scoring_flops / 1e9:.3g}); "
                f"dense {self.prefill_flops_dense / 1e9:.4g}, ratio {ratio:.3f}",
                f"KV cache {self.kv_bytes / 2**20:.4g} MiB measured; dense {self.kv_bytes_dense / 2**20:.4g} MiB",
                f"{self.prefills} prefills routed",
            )
        )


def _slashed(counts: Sequence[int]) -> str:
    """One count per sample: 576/576/0."""
    return "/".join(map(str, counts))


def make_stats(
    plan: Plan,
    shape: ModelShape,
    names: dict[str, Any],
    cache_layers: Sequence[Any],
    element_size: int,
    prefills: int,
) -> Stats:
    """Stats of one prefill. ``cache_layers`` are the cache's layers after it, ``names`` the descriptive fields."""
    schedule, batch, layers = plan.schedule, plan.batch, shape.num_layers
    stages = [schedule.stage_of(layer) for layer in range(layers)]
    visual = [plan.visual_counts if s < 0 else plan.kept[s] for s in stages]
    total = sum(plan.visual_counts)
    average = sum(map(sum, visual)) / layers
    widths = [plan.width(s) for s in stages]
    pools = [sum(plan.lengths) if plan.scores_pool(s) else batch * plan.width(s - 1) for s in range(len(plan.kept))]
    scoring = float(sum(scoring_flops(shape, rows) for rows in pools))
    tensors = [(layer.keys, layer.values) for layer in cache_layers]
    dense = [plan.length] * layers
    return Stats(
        **names,
        layers=schedule.layers,
        visual=plan.visual_counts,
        kept=tuple(zip(*plan.kept, strict=True)),
        avg_tokens=average / batch,
        keep=average / total,
        prefill_flops=batch * prefill_flops(shape, widths) + scoring,
        scoring_flops=scoring,
        prefill_flops_dense=float(batch * prefill_flops(shape, dense)),
        kv_bytes=sum(k.numel() * k.element_size() + v.numel() * v.element_size() for k, v in tensors),
        kv_bytes_dense=batch * kv_bytes(shape, [plan.past + plan.length] * layers, element_size),
        layer_lengths=tuple(int(k.shape[-2]) for k, _ in tensors) or tuple(widths),
        prefills=prefills,
    )
