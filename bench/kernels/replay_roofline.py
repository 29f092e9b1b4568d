"""Prefills with ``graphs=True`` beside eager ones, on an H100 by formula: ``python -m bench.kernels.replay_roofline``.

Nothing here is measured but the host time of a replay, on a CPU. A replay runs whole tiles of rows, takes its inputs in
and copies caches out; ``prefill_roofline`` knows all else. ``FORMULA`` says it in full.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import NamedTuple

from reroute.core.cost import ModelShape, kv_bytes
from reroute.core.schedule import Schedule
from reroute.graphs import in_tiles, waste
from reroute_kernels.testing.cases import TEXT

from ..end_to_end.flops import DECODERS
from . import prefill_roofline
from .prefill_roofline import (
    ATTENTION_RATE,
    ATTENTION_START,
    FUSED,
    HOST,
    MODULES,
    Elementwise,
    PrefillTime,
    costs,
    decision_seconds,
    prefill_time,
    product_seconds,
    schedule_of,
    span,
)
from .roofline import BANDWIDTH, GRAPH_LAUNCH, ITEM

__all__ = [
    "FORMULA",
    "TOWERS",
    "Comparison",
    "Tower",
    "compare",
    "comparisons",
    "compiled_table",
    "main",
    "replayed",
    "table",
    "verdicts",
]

PROBLEMS = tuple(product((576, 2880, 16384), (1, 8)))
"""Visual tokens and batch."""
BUDGETS = Fraction(1, 3), Fraction(1, 9)
REPLAY_HOST = 0.5e-3  # seconds until the graph is launched, a plan among them: on a CPU (docs/design/graphs.md)
LAYER_LAUNCHES = 36  # of a decoder layer, which ``HOST`` is the time of

FORMULA = f"""\
    replay = {1e3 * REPLAY_HOST:.1f} ms of host time + the prefill as a graph, in rows of its class:
             whole tiles of 64, or parts of them where few rows of a batch make whole ones together
             + copies, read and written: embeddings in, keys and values out, hidden states out twice;
             of a routed one also a clear home; {1e6 * GRAPH_LAUNCH:.1f} µs a launch
    tower  = max(products + attention of all pairs + elementwise as above, launches / {LAYER_LAUNCHES} of the host time
             of a decoder layer); CLIP ViT-L/14 of 336² pixels for each 576 tokens, and Qwen2.5-VL's of one picture"""


class Aim(NamedTuple):
    """Of a decoder's prefill at batch 1: how far ``graph / dense graph`` may be above the ratio of FLOPs."""

    visual: int
    above: float


AIMS = Aim(576, 0.12), Aim(16384, 0.02)
SPEEDUP = 3.0  # of a routed graph at a ninth, beside a dense eager prefill of batch 1


def replayed(
    shape: ModelShape, schedule: Schedule | None, visual: int, batch: int, between: Elementwise = MODULES
) -> tuple[float, float]:
    """Seconds of a replay, all of it; of a dense one without ``schedule``. See ``PrefillTime.graph`` for the two."""
    kept = [visual] * shape.num_layers if schedule is None else schedule.per_layer(visual, shape.num_layers)
    decisions = (0.0, 0.0) if schedule is None else decision_seconds(shape, schedule, visual, batch)
    needed = [TEXT + count for count in kept]
    prefill = prefill_time(shape, _tiles(needed, batch), batch, decisions, between)
    stages = 1 if schedule is None else 1 + len(schedule.layers)
    states = ITEM * batch * (visual + TEXT) * shape.hidden
    moved = (6 if schedule is None else 7) * states + 2 * batch * kv_bytes(shape, needed, ITEM)
    around = REPLAY_HOST + moved / BANDWIDTH + (6 + stages) * GRAPH_LAUNCH
    least, most = prefill.graph
    return around + least, around + most


def _tiles(rows: Sequence[int], batch: int) -> list[int]:
    return [in_tiles(count, batch) for count in rows]


@dataclass(frozen=True)
class Tower:
    """Sizes of a vision tower; what is not said of rows is said of patches.

    - ``picture``: visual tokens of one picture, with ``merged`` patches each; None: all tokens are one picture.
    - ``matrices``: (columns, depth) of a layer's products; ``projector``: those of a visual token.
    - ``window``: patches that attend to each other in all layers but ``full``; None: all do in all layers.
    - ``moves``: bytes of a patch outside of the products, for each hidden feature; in ``launches``, products with them.
    """

    layers: int
    hidden: int
    matrices: tuple[tuple[int, int], ...]
    projector: tuple[tuple[int, int], ...]
    launches: int
    moves: int
    merged: int
    picture: int | None = None
    window: int | None = None
    full: int = 0

    def seconds(self, visual: int, batch: int) -> tuple[float, float]:
        """Eagerly, with the least and the most host time."""
        pictures = batch * (1 if self.picture is None else math.ceil(visual / self.picture))
        patches = self.merged * (self.picture or visual)
        rows = pictures * patches
        layer = sum(product_seconds(rows, *matrix) for matrix in self.matrices)
        layer += self.moves * rows * self.hidden / BANDWIDTH + (self.launches - len(self.matrices)) * GRAPH_LAUNCH
        everywhere = self.layers if self.window is None else self.full
        pairs = everywhere * patches + (self.layers - everywhere) * (self.window or 0)
        attention = 4 * self.hidden * rows * pairs / ATTENTION_RATE + self.layers * ATTENTION_START
        projector = sum(product_seconds(rows // self.merged, *matrix) for matrix in self.projector)
        device = self.layers * layer + attention + projector
        least, most = (max(device, self.layers * self.launches / LAYER_LAUNCHES * host) for host in HOST)
        return least, most


_CLIP = (*((1024, 1024),) * 4, (4096, 1024), (1024, 4096))
_QWEN = ((3 * 1280, 1280), (1280, 1280), *((3420, 1280),) * 2, (1280, 3420))
# LayerNorm moves a feature twice in one launch, the activation of CLIP 3 times its width of 4; RMSNorm, RoPE and
# a gated MLP move what they move in a decoder.
TOWERS = {
    "LLaVA-1.5-7B": Tower(
        layers=23,  # of 24
        hidden=1024,
        matrices=_CLIP,
        projector=((4096, 1024), (4096, 4096)),
        launches=16,
        moves=2 * (4 + 6 + 12),
        merged=1,
        picture=576,
    ),
    "Qwen2.5-VL-7B": Tower(
        layers=32,
        hidden=1280,
        matrices=_QWEN,
        projector=((5120, 5120), (3584, 5120)),
        launches=40,
        moves=2 * 36 + 2 * 30,
        merged=4,
        window=64,
        full=4,
    ),
}


@dataclass(frozen=True)
class Comparison:
    """One problem: seconds, least and most.

    ``flops``: routed / dense, scoring included, with a causal mask. ``waste``: what fillers add to a routed replay, by
    the model that decides whether there is one.
    """

    model: str
    visual: int
    batch: int
    keep: Fraction
    tower: tuple[float, float]
    dense_eager: tuple[float, float]
    dense_graph: tuple[float, float]
    routed_eager: tuple[float, float]
    routed_graph: tuple[float, float]
    flops: float
    waste: float

    @property
    def ratio(self) -> tuple[float, float]:
        """Routed graph / dense graph."""
        return _over(self.routed_graph, self.dense_graph)

    @property
    def speedup(self) -> tuple[float, float]:
        """Dense eager / routed graph: with the least host time and no latency hidden, and the other way round."""
        return self.dense_eager[0] / self.routed_graph[1], self.dense_eager[1] / self.routed_graph[0]


def compare(model: str, visual: int, batch: int, keep: Fraction, between: Elementwise = MODULES) -> Comparison:
    """``pdrop`` at the budget ``keep``; ``between``: what graphs, and only they, run between their products."""
    shape = DECODERS[model]
    schedule = schedule_of(shape.num_layers, "route", float(keep))
    needed = [TEXT + count for count in (visual, *schedule.counts(visual))]
    eager: list[PrefillTime] = [
        prefill_roofline.dense(shape, visual, batch),
        prefill_roofline.routed(shape, schedule, visual, batch),
    ]
    return Comparison(
        *(model, visual, batch, keep, TOWERS[model].seconds(visual, batch)),
        *(eager[0].eager, replayed(shape, None, visual, batch, between)),
        *(eager[1].eager, replayed(shape, schedule, visual, batch, between)),
        costs(shape, schedule, "route", visual).flop_ratio_causal,
        waste(shape, schedule, _tiles(needed, batch), needed, batch).seconds,
    )


def table() -> Iterator[tuple[str, ...]]:
    """A row of headings, then one for each model, budget and problem; times in milliseconds."""
    yield (
        *("model", "N", "B", "budget", "tower", "dense eager", "dense graph", "routed eager", "routed graph"),
        *("graph, routed / dense", "FLOPs", "dense eager / routed graph", "fillers"),
    )
    for its in comparisons():
        times = its.tower, its.dense_eager, its.dense_graph, its.routed_eager, its.routed_graph
        yield (
            *(its.model, str(its.visual), str(its.batch), str(its.keep), *(_milliseconds(each) for each in times)),
            *(span(its.ratio, 2), f"{its.flops:.2f}", span(its.speedup, 1), f"{its.waste:.0%}"),
        )


def compiled_table() -> Iterator[tuple[str, ...]]:
    """Graphs of modules beside graphs in which a compiler has joined what runs between products; batch 1."""
    yield "model", "N", "budget", "elementwise", "dense", "compiled", "routed", "compiled", "times faster"
    for its in comparisons():
        if its.batch == 1:
            shape = DECODERS[its.model]
            whole = prefill_roofline.dense(shape, its.visual)
            other = compare(its.model, its.visual, 1, its.keep, FUSED)
            times = its.dense_graph, other.dense_graph, its.routed_graph, other.routed_graph
            yield (
                *(its.model, str(its.visual), str(its.keep), f"{whole.elementwise / whole.layers_alone:.0%}"),
                *map(_milliseconds, times),
                " and ".join(span(_over(a, b), 2) for a, b in (times[:2], times[2:])),
            )


def verdicts() -> Iterator[str]:
    """Of each aim whether the model meets it."""
    for its in comparisons():
        name = f"{its.model}, N = {its.visual}, {its.keep}"
        above = its.ratio[1] - its.flops
        for aim in AIMS:
            if (its.visual, its.batch) == (aim.visual, 1):
                met = "met" if above <= aim.above else "**missed**"
                yield f"{name}: {above:.3f} above the ratio of FLOPs, aim {aim.above}: {met}"
        if its.batch == 1 and its.keep == BUDGETS[1]:
            met = "met" if its.speedup[0] >= SPEEDUP else "**missed**"
            yield f"{name}: {span(its.speedup, 1)} times faster than dense eager, aim {SPEEDUP:.0f}: {met}"


def comparisons() -> Iterator[Comparison]:
    """All problems."""
    for model, keep, problem in product(TOWERS, BUDGETS, PROBLEMS):
        yield compare(model, *problem, keep)


def _over(ours: tuple[float, float], theirs: tuple[float, float]) -> tuple[float, float]:
    return ours[0] / theirs[0], ours[1] / theirs[1]


def _milliseconds(ends: Sequence[float]) -> str:
    return span([1e3 * t for t in ends], 1)


def main() -> None:
    """Print the formulas, the tables and the verdicts."""
    print(
        f"Modelled for an H100 SXM, not measured; milliseconds, bf16, pdrop:\n\n{prefill_roofline.FORMULA}\n{FORMULA}\n"
    )
    for rows in (table(), compiled_table()):
        print("\n".join(map(" | ".join, rows)), end="\n\n")
    print("\n".join(verdicts()))


if __name__ == "__main__":
    main()
