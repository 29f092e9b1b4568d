"""Time of a whole prefill on an H100 by formula: ``python -m bench.kernels.prefill_roofline``.

Nothing here is measured. A layer is its matrix products, its attention and what PyTorch runs element by element between
them; a routed prefill adds its decisions, which ``roofline`` knows. Weights are bf16; the modules are those of
Transformers, without fusion. ``FORMULA`` says it in full.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from reroute import methods
from reroute.core.cost import ModelShape, estimate_cost, prefill_cost
from reroute.core.schedule import Action, Schedule
from reroute_kernels.testing.cases import TEXT, KernelCase, KernelShape

from ..end_to_end.flops import DECODERS
from .roofline import BANDWIDTH, GRAPH_LAUNCH, ITEM, kernel_time

__all__ = [
    "ATTENTION_RATE",
    "ATTENTION_START",
    "FORMULA",
    "FUSED",
    "HOST",
    "MODULES",
    "Costs",
    "Elementwise",
    "PrefillTime",
    "costs",
    "decision_seconds",
    "dense",
    "main",
    "prefill_time",
    "product_seconds",
    "routed",
    "schedule_of",
    "span",
    "table",
]

BUDGETS = {
    Fraction(1, 3): ((576, 1), (2880, 1), (16384, 1), (576, 8), (2880, 8)),
    Fraction(1, 9): ((576, 1), (2880, 1)),
}
"""Budget, avg_T / N: visual tokens and batch of each problem that is shown."""

SMS = 132  # streaming multiprocessors of an H100 SXM
RATE = 798e12  # FLOP a second: a large bf16 product on an H100 SXM, as reported by others
ATTENTION_RATE = 450e12  # FLOP a second of flash attention with a causal mask, forward: an assumption
TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.85), (64, 256, 0.85), (64, 128, 0.7))
"""Rows and columns of the output that one program of a product makes, and the share of ``RATE`` that it reaches."""
SPLITS = (1, 2, 4)  # programs that share the sum of one tile
JOIN = 2e-6  # seconds to add their parts up
START = 1.5e-6  # seconds until a product is at full speed
ATTENTION_START = 4e-6
HOST = (
    12e-3 / 32,
    20e-3 / 32,
)  # seconds of host time for a layer of an eager Transformers model: as reported by others

_RATES = {
    "bytes": f"bytes / {BANDWIDTH / 1e12:.2f} TB/s",
    "rate": f"{RATE / 1e12:.0f} / {SMS} TFLOP/s",
    "launch": f"{1e6 * GRAPH_LAUNCH:.1f} µs",
    "start": f"{1e6 * (GRAPH_LAUNCH + START):.1f} µs",
    "attention": f"{ATTENTION_RATE / 1e12:.0f} TFLOP/s + {1e6 * ATTENTION_START:.0f} µs",
    "host": f"{1e3 * HOST[0]:.2f} ... {1e3 * HOST[1]:.2f} ms",
}
FORMULA = """\
    prefill     = layers + decisions + output head; M rows are those of the whole batch
    layer       = 7 products + attention + elementwise
    product     = max(waves * time of a tile, {bytes}) + {start}; waves = ceil(tiles / {sms} SMs);
                  the best of 5 tiles (256 x 128 to 64 x 128, of which an SM does {rate}, times 1.0 to 0.7)
                  and of 1, 2 or 4 programs a tile
    attention   = 2 * H * D * sum of S² over the batch / {attention}
    elementwise = {bytes} + {launch} a launch: 2 norms (36 bytes a feature, 8 launches each),
                  RoPE (9 passes, 10 launches), gate (5, 2), residuals (6, 2), the cache (4, 2)
    decision    = key projection of all rows + query projection + step (docs/design/benchmarks.md)
    output head = {bytes} of its weights
    eager       = max(prefill, layers * {host} of host time)""".format(sms=SMS, **_RATES)


@dataclass(frozen=True)
class Elementwise:
    """What a layer runs beside its products and its attention: (bytes moved for each feature of a row, launches).

    The features are those of the hidden size, of all query and key heads, of the MLP, and of the key heads.
    """

    norms: tuple[int, int]
    rope: tuple[int, int]
    gate: tuple[int, int]
    residuals: tuple[int, int]
    cache: tuple[int, int]

    def seconds(self, shape: ModelShape, rows: int) -> float:
        """Of one layer on so many rows."""
        heads, keys = (shape.heads + shape.kv_heads) * shape.head_dim, shape.kv_heads * shape.head_dim
        parts = (
            *((self.norms, shape.hidden), (self.rope, heads), (self.gate, shape.intermediate)),
            *((self.residuals, shape.hidden), (self.cache, keys)),
        )
        return sum(rows * size * width / BANDWIDTH + launches * GRAPH_LAUNCH for (size, launches), width in parts)


MODULES = Elementwise((2 * 36, 16), (9 * ITEM, 10), (5 * ITEM, 2), (6 * ITEM, 2), (4 * ITEM, 2))
"""Transformers' modules as PyTorch runs them."""
FUSED = Elementwise((2 * 4 * ITEM, 2), (2 * ITEM, 1), (3 * ITEM, 1), (0, 0), (4 * ITEM, 2))
"""What a compiler makes of them: each residual is added where its sum is normed, and nothing is moved twice."""


@dataclass(frozen=True)
class PrefillTime:
    """Seconds of one prefill as a CUDA graph, by part. ``decisions``: with their latency hidden, and with none hidden.

    ``layers`` counts the decoder layers, on which the host time of an eager prefill depends.
    """

    products: float
    attention: float
    elementwise: float
    head: float
    decisions: tuple[float, float]
    layers: int

    @property
    def graph(self) -> tuple[float, float]:
        """Device time, which is that of a CUDA graph."""
        least, most = self.decisions
        alone = self.layers_alone + self.head
        return alone + least, alone + most

    @property
    def eager(self) -> tuple[float, float]:
        """What a caller waits for: the device or the host, whichever is later."""
        least, most = (max(device, self.layers * host) for device, host in zip(self.graph, HOST, strict=True))
        return least, most

    @property
    def layers_alone(self) -> float:
        """The decoder layers, on as many rows without any routing."""
        return self.products + self.attention + self.elementwise


@dataclass(frozen=True)
class Costs:
    """A schedule beside the dense prefill, by the FLOP model: with all pairs in attention, and with a causal mask."""

    avg_tokens: float
    flop_ratio: float
    flop_ratio_causal: float


@dataclass(frozen=True, kw_only=True)
class _Decision(KernelCase):
    """One decision of any decoder, which keeps ``count`` visual tokens."""

    sizes: KernelShape
    count: int

    @property
    def shape(self) -> KernelShape:
        return self.sizes

    @property
    def kept(self) -> int:
        return self.count


def schedule_of(num_layers: int, action: Action, keep: float) -> Schedule:
    """PDrop's schedule for the budget ``keep`` = avg_T / N: what prefills are measured and modelled with."""
    return methods.get("pdrop").with_budget(keep, num_layers, action).schedule(num_layers, action)


def costs(shape: ModelShape, schedule: Schedule, action: Action, visual: int, text: int = TEXT) -> Costs:
    """By ``reroute.core.cost``."""
    ratios = {}
    for attention in ("dense", "causal"):
        spent = estimate_cost(shape, schedule, action, visual, text, attention=attention)
        whole = prefill_cost(shape, [visual + text] * shape.num_layers, attention=attention)
        ratios[attention] = spent.prefill_flops / whole.prefill_flops
    return Costs(spent.avg_tokens, ratios["dense"], ratios["causal"])


def dense(shape: ModelShape, visual: int, batch: int = 1) -> PrefillTime:
    """The plain model."""
    return prefill_time(shape, [visual + TEXT] * shape.num_layers, batch)


def routed(shape: ModelShape, schedule: Schedule, visual: int, batch: int = 1) -> PrefillTime:
    """With the action ``route``: every decision is made among all visual tokens."""
    lengths = [TEXT + kept for kept in schedule.per_layer(visual, shape.num_layers)]
    return prefill_time(shape, lengths, batch, decision_seconds(shape, schedule, visual, batch))


def prefill_time(
    shape: ModelShape,
    lengths: Sequence[int],
    batch: int,
    decisions: tuple[float, float] = (0.0, 0.0),
    between: Elementwise = MODULES,
) -> PrefillTime:
    """Layers that run ``lengths`` rows of each sample, what decisions take, and what runs ``between`` products."""
    head = shape.vocab * shape.hidden * ITEM / BANDWIDTH
    products = sum(_products(shape, batch * length) for length in lengths)
    attention = sum(_attention(shape, length, batch) for length in lengths)
    elementwise = sum(between.seconds(shape, batch * length) for length in lengths)
    return PrefillTime(products, attention, elementwise, head, decisions, len(lengths))


def _products(shape: ModelShape, rows: int) -> float:
    hidden, inner = shape.hidden, shape.intermediate
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = ((query, hidden), (key, hidden), (key, hidden), (hidden, query), (inner, hidden), (inner, hidden))
    return sum(product_seconds(rows, columns, depth) for columns, depth in (*sizes, (hidden, inner)))


@cache
def product_seconds(rows: int, columns: int, depth: int) -> float:
    """Of (rows, depth) and (depth, columns)."""
    computing = min(_waves(rows, columns, depth, tile, split) for tile in TILES for split in SPLITS)
    moving = ITEM * (rows * depth + depth * columns + rows * columns) / BANDWIDTH
    return max(computing, moving) + GRAPH_LAUNCH + START


def _waves(rows: int, columns: int, depth: int, tile: tuple[int, int, float], split: int) -> float:
    high, wide, efficiency = tile
    programs = math.ceil(rows / high) * math.ceil(columns / wide) * split
    seconds = 2 * high * wide * (depth / split) / (RATE / SMS * efficiency)
    # Parts of a sum are written and read in fp32.
    joining = 0.0 if split == 1 else 2 * 4 * split * rows * columns / BANDWIDTH + JOIN
    return math.ceil(programs / SMS) * seconds + joining


def _attention(shape: ModelShape, length: int, batch: int) -> float:
    return 2 * shape.heads * shape.head_dim * batch * length**2 / ATTENTION_RATE + ATTENTION_START


def decision_seconds(shape: ModelShape, schedule: Schedule, visual: int, batch: int) -> tuple[float, float]:
    """All decisions of a prefill, and putting its output together again: with latency hidden, and not."""
    sizes = KernelShape(shape.heads, shape.kv_heads, shape.hidden, shape.head_dim)
    cases = [_Decision("", visual, batch, sizes=sizes, count=kept) for kept in schedule.counts(visual)]
    rows = batch * (visual + TEXT)
    keys = product_seconds(rows, shape.kv_heads * shape.head_dim, shape.hidden)
    query = product_seconds(batch, shape.heads * shape.head_dim, shape.hidden)
    steps = [kernel_time("step", case) for case in cases]
    ends = [kernel_time(name, cases[-1]) for name in ("defer", "restore")]
    projections = len(steps) * (keys + query)
    return projections + sum(m.hidden for m in (*steps, *ends)), projections + sum(m.graph for m in (*steps, *ends))


def table() -> Iterator[tuple[str, ...]]:
    """A row of headings, then one for each model, problem and budget; times in milliseconds."""
    yield (
        *("model", "N", "B", "budget", "dense: products, attention, elementwise", "dense", "routed", "decisions"),
        *("routed / dense", "layers alone", "FLOPs, causal", "all pairs", "eager, routed / dense"),
    )
    for name, shape in DECODERS.items():
        for keep, problems in BUDGETS.items():
            yield from (_row(name, shape, keep, visual, batch) for visual, batch in problems)


def _row(name: str, shape: ModelShape, keep: Fraction, visual: int, batch: int) -> tuple[str, ...]:
    schedule = schedule_of(shape.num_layers, "route", float(keep))
    plain, ours = dense(shape, visual, batch), routed(shape, schedule, visual, batch)
    spent = costs(shape, schedule, "route", visual)
    parts = ", ".join(f"{1e3 * t:.1f}" for t in (plain.products, plain.attention, plain.elementwise))
    graph, eager = (_ratios(ends) for ends in ((ours.graph, plain.graph), (ours.eager, plain.eager)))
    return (
        *(name, str(visual), str(batch), str(keep), parts, f"{1e3 * plain.graph[0]:.1f}"),
        *(span([1e3 * t for t in ours.graph], 1), span([1e3 * t for t in ours.decisions], 2), span(graph, 2)),
        f"{ours.layers_alone / plain.layers_alone:.2f}",
        *(f"{ratio:.2f}" for ratio in (spent.flop_ratio_causal, spent.flop_ratio)),
        span(eager, 2),
    )


def _ratios(ends: tuple[Sequence[float], Sequence[float]]) -> list[float]:
    return [ours / dense for ours, dense in zip(*ends, strict=True)]


def span(values: Sequence[float], digits: int) -> str:
    """One number, or two where they differ as printed."""
    texts = [f"{value:.{digits}f}" for value in sorted(values)]
    return " … ".join(dict.fromkeys(texts))


def main() -> None:
    """Print the formula and the table."""
    print(f"Modelled for an H100 SXM, not measured; milliseconds, bf16, pdrop:\n\n{FORMULA}\n")
    for row in table():
        print(" | ".join(row))


if __name__ == "__main__":
    main()
