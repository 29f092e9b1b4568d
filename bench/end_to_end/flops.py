"""What routing saves on real models, by formula: nothing here is measured."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from reroute import methods
from reroute.core.cost import ModelShape, estimate_cost, prefill_cost
from reroute_kernels.testing.cases import TEXT

__all__ = ["DECODERS", "TEXT", "FlopEstimate", "table"]

DECODERS = {
    "LLaVA-1.5-7B": ModelShape(32, 4096, 11008, 32, 32, 128, 32064),
    "Qwen2.5-VL-7B": ModelShape(28, 3584, 18944, 28, 4, 128, 152064),
    "Qwen2.5-VL-32B": ModelShape(64, 5120, 27648, 40, 8, 128, 152064),
}
SHOWN = ("LLaVA-1.5-7B", "Qwen2.5-VL-7B")
PROMPTS = (576, 2304)
BUDGETS = (Fraction(1, 3), Fraction(2, 9), Fraction(1, 9))


@dataclass(frozen=True)
class FlopEstimate:
    """One prompt of ``visual`` + 60 tokens; ``keep`` is the budget asked for, ``avg_tokens`` the one that comes out.

    TFLOPs are those of the prefill with scoring, without the LM head; KV bytes are of 16-bit caches.
    """

    model: str
    visual: int
    method: str
    keep: str
    avg_tokens: float
    tflops: float
    flops_ratio: float
    kv_mib: float


def table() -> list[FlopEstimate]:
    """Dense, and every method at every budget."""
    rows = []
    for model in SHOWN:
        shape = DECODERS[model]
        for visual in PROMPTS:
            dense = prefill_cost(shape, [visual + TEXT] * shape.num_layers)
            spent = (dense.prefill_flops / 1e12, 1.0, dense.kv_bytes / 2**20)
            rows.append(FlopEstimate(model, visual, "dense", "1", float(visual), *spent))
            for name in ("fastv", "pdrop"):
                for keep in BUDGETS:
                    method = methods.get(name).with_budget(float(keep), shape.num_layers, "route")
                    cost = estimate_cost(shape, method.schedule(shape.num_layers, "route"), "route", visual, TEXT)
                    ratio = cost.prefill_flops / dense.prefill_flops
                    spent = (cost.prefill_flops / 1e12, ratio, cost.kv_bytes / 2**20)
                    rows.append(FlopEstimate(model, visual, f"{name} route", str(keep), cost.avg_tokens, *spent))
    return rows
