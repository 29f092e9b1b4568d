"""Times of the kernels on an H100 by formula: ``python -m bench.kernels.roofline [--all] [--counts]``.

None is measured. A launch takes the time in which its distinct bytes cross the memory bus, the latency of the loads of
one program that wait for each other, and a fixed cost. The bytes are functions of the shape alone;
``tests/bench/kernels/test_roofline.py`` holds them against what simt counts.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from reroute_kernels.ranking import picks_per_round
from reroute_kernels.testing.cases import MODELS, OPERATIONS, PAGE, TEXT, VISUAL, KernelCase, KernelInputs
from reroute_kernels.testing.find_simt import MISSING, simt_path
from reroute_kernels.testing.traffic import Traffic, count_traffic

__all__ = [
    "AFFORDABLE",
    "BANDWIDTH",
    "GRAPH_LAUNCH",
    "ITEM",
    "KernelTime",
    "counted",
    "distinct_bytes",
    "floor_bytes",
    "kernel_time",
    "num_launches",
]

BANDWIDTH = 3.35e12 * 0.85  # bytes a second: H100 SXM, and the share that coalesced loads are reported to reach
GRAPH_LAUNCH = 1.5e-6  # seconds between the kernels of a CUDA graph: an assumption
EAGER_LAUNCH = (6e-6, 18e-6)  # seconds of host time for an eager Triton launch: as reported
ITEM, INT, FLOAT = 2, 8, 4  # bytes of a hidden feature (bf16), an index, a score
ACCESS = 0.7e-6  # seconds until a load that misses the L1 cache is there
# Loads that wait for each other: index, page, row; page or place, row; counts, query row, angles, query, keys.
WAITS = {"rows": 3, "defer_rmsnorm": 2, "score": 5}
# The same of a diverse selection's first three launches, and of a round before its tiles: counts, picks, rows' numbers.
DIVERSE_WAITS, ROUND_WAITS = 10, 4
L2_BANDWIDTH = 5.5e12  # bytes a second, as reported: what the tiles of many picks are read again with
SM_BANDWIDTH = 109e9  # bytes a second from L2 to one multiprocessor: 64 a clock
# Seconds of the program that picks, and of it for each chunk of so many candidates (docs/design/benchmarks.md).
PICK, PICK_CHUNK = 5e-6, {1024: 1.4e-6, 2048: 2.3e-6}
# Seconds of the selection by the number of candidates: waits, barriers, instructions (docs/design/benchmarks.md).
SELECTION = {1024: 12e-6, 4096: 14.7e-6, 32768: 21.1e-6, 1 << 22: 29.1e-6}
BINS = 512 * INT // 2  # bytes of a histogram
NOTES = 8  # bytes per candidate that the selection writes and reads for itself
LAUNCHES = {"defer": 1, "admit": 1, "restore": 1, "defer_rmsnorm": 1, "select": 1, "score_topk": 2, "step": 4}
STEP = ("defer_rmsnorm", "score_topk", "admit")
AFFORDABLE = 2304  # visual tokens, batch 1: beyond this simt takes too long


@dataclass(frozen=True)
class KernelTime:
    """Seconds. floor: the rows and keys that any implementation moves, at the same bandwidth. hidden: in a graph whose
    launches hide all latency; graph: where they hide none. eager: a range.
    """

    operation: str
    case: KernelCase
    launches: int
    bytes: int
    floor: float
    hidden: float
    graph: float
    eager: tuple[float, float]


def kernel_time(operation: str, case: KernelCase) -> KernelTime:
    """By formula."""
    launches, size = num_launches(operation, case), distinct_bytes(operation, case)
    hidden = launches * GRAPH_LAUNCH + size / BANDWIDTH
    if operation == "diverse_topk":
        hidden += _rereading(case)
    graph = hidden + latency(operation, case)
    # Eagerly the host launches one after the other while the device works.
    least, most = (max(graph, launches * cost) for cost in EAGER_LAUNCH)
    floor = floor_bytes(operation, case) / BANDWIDTH
    return KernelTime(operation, case, launches, size, floor, hidden, graph, (least, most))


def num_launches(operation: str, case: KernelCase) -> int:
    """Of an operation: three, one for each round but the first, and a selection, if it is diverse."""
    return 3 + len(picks_per_round(case.kept)) if operation == "diverse_topk" else LAUNCHES[operation]


def latency(operation: str, case: KernelCase) -> float:
    """Seconds of loads that wait for each other in one program, and of what one program does alone."""
    if operation == "step":
        return sum(latency(part, case) for part in STEP)
    selection = next(seconds for most, seconds in SELECTION.items() if case.visual <= most)
    if operation == "score_topk":
        return WAITS["score"] * ACCESS + selection
    if operation == "diverse_topk":
        rounds = len(picks_per_round(case.kept)) - 1
        chunk = 1024 if case.visual <= 1024 else 2048
        pick = PICK + PICK_CHUNK[chunk] * -(-case.visual // chunk)
        waits = (DIVERSE_WAITS + ROUND_WAITS * rounds) * ACCESS
        return waits + rounds * pick + _of_one_program(case) + selection
    return selection if operation == "select" else WAITS.get(operation, WAITS["rows"]) * ACCESS


def floor_bytes(operation: str, case: KernelCase) -> int:
    """Rows moved, each read once and written once, and normed ones written; keys read once; of a bare selection the
    scores.
    """
    if operation == "step":
        return sum(floor_bytes(part, case) for part in STEP)
    if operation == "score_topk":
        return case.batch * case.length * case.shape.kv_heads * case.shape.head_dim * ITEM
    if operation == "select":
        return case.batch * case.visual * FLOAT
    if operation == "diverse_topk":
        return case.batch * _passes(case) * case.visual * case.shape.hidden * ITEM
    rows = 2 * (case.width if operation in ("defer", "admit") else case.length)
    if operation == "defer_rmsnorm":  # all are read and written, and what ran goes home
        rows += case.width
    return case.batch * rows * case.shape.hidden * ITEM


def distinct_bytes(operation: str, case: KernelCase) -> int:
    """Distinct bytes that the launches read and write, summed over launches."""
    if operation == "step":
        return sum(distinct_bytes(part, case) for part in STEP)
    if operation == "score_topk":
        return case.batch * (_score(case) + _selection(case, heads=case.shape.heads))
    if operation == "select":
        return case.batch * _selection(case, heads=1)
    if operation == "diverse_topk":
        return case.batch * _diverse(case)
    if operation == "defer_rmsnorm":  # whole pages, and the weight; page ids and places
        rows = case.pages * PAGE
        indices = (case.pages + rows) * INT
        return (2 * rows + case.batch * case.width + 1) * case.shape.hidden * ITEM + indices
    rows = case.batch * (case.length if operation == "restore" else case.width)
    aux = 2 * 2 * case.shape.head_dim * ITEM + 2 * INT if operation == "admit" else 0  # cos, sin, ids
    return floor_bytes(operation, case) + rows * (aux + INT) + case.pages * INT


def _score(case: KernelCase) -> int:
    """Of one sample: keys, the half of cos and sin that is not a repetition, the query; logits and statistics, and a
    histogram that is cleared.
    """
    shape, length = case.shape, case.length
    keys = length * shape.kv_heads * shape.head_dim * ITEM
    tables = length * shape.head_dim * ITEM
    logits = shape.heads * -(-length // 16) * 16 * FLOAT
    return keys + tables + shape.heads * shape.head_dim * ITEM + logits + _statistics(case) + BINS


def _statistics(case: KernelCase) -> int:
    """Of one sample: maxima and sums of all parts and heads."""
    from reroute_kernels.triton_kernels.score import most_splits, tiling

    shape = case.shape
    tiles = tiling(shape.heads, shape.kv_heads, shape.head_dim, ITEM, False)
    return min(-(-case.length // tiles.block_n), most_splits(tiles)) * shape.heads * 2 * FLOAT


def _selection(case: KernelCase, heads: int) -> int:
    """Of one sample: logits and statistics, or scores, row lists and positions in; scores, kept, active and their
    positions, and the place of each row out; its notes, and a histogram that is counted and read.
    """
    per_candidate = heads * FLOAT + 2 * INT + FLOAT + NOTES
    places = case.pages // case.batch * PAGE
    indices = (2 * TEXT + case.kept + 2 * case.width + places) * INT
    return case.visual * per_candidate + indices + 2 * BINS + (_statistics(case) if heads > 1 else 0)


def _passes(case: KernelCase) -> int:
    """Over the candidates' states: for norms, centrality, and after each round but the last."""
    return 1 + len(picks_per_round(case.kept))


def _diverse(case: KernelCase) -> int:
    """Of one sample: states and row lists of each pass; norms, partial sums and their sum, scores and keys; the
    selection.
    """
    from reroute_kernels.triton_kernels.diverse import split_size

    rounds = _passes(case) - 2
    sums = (2 * -(-case.visual // split_size(case.visual)) + 2) * case.shape.hidden * FLOAT
    # Norms are written once and read in each other pass; a first pick writes a score and a key, a round reads and
    # writes both, the last one no key.
    per_candidate = INT * _passes(case) + FLOAT * (_passes(case) + 2 + 4 * rounds - 1)
    states = floor_bytes("diverse_topk", case) // case.batch
    return states + sums + case.visual * per_candidate + _selection(case, heads=1)


def _of_one_program(case: KernelCase) -> float:
    """Seconds by which one program's rows and picks take longer to reach it than all states take to arrive."""
    from reroute_kernels.triton_kernels.diverse import split_size, tiling

    row = case.shape.hidden * ITEM
    arriving = case.batch * case.visual * row / BANDWIDTH
    rows = [split_size(case.visual)] * 2
    rows += [tiling(case.shape.hidden, ITEM).block_n + m for m in picks_per_round(case.kept)[:-1]]
    return sum(max(count * row / SM_BANDWIDTH - arriving, 0) for count in rows)


def _rereading(case: KernelCase) -> float:
    """Seconds by which the tiles of a round's picks and candidates take longer to cross the L2 cache than the states
    take to arrive.
    """
    from reroute_kernels.triton_kernels.diverse import tiling

    tile, row = tiling(case.shape.hidden, ITEM), case.shape.hidden * ITEM
    arriving = case.batch * case.visual * row / BANDWIDTH
    again = (
        case.batch * row * (-(-m // tile.block_m) * case.visual + -(-case.visual // tile.block_n) * m) / L2_BANDWIDTH
        for m in picks_per_round(case.kept)[:-1]
    )
    return sum(max(seconds - arriving, 0) for seconds in again)


def counted(operation: str, case: KernelCase) -> Traffic:
    """What simt counts; RuntimeError without simt."""
    from reroute_kernels import Backend, ops

    backend = Backend.of("triton", "counted", ops)
    inputs = KernelInputs(case, torch.device("cpu"), torch.bfloat16)
    return count_traffic(lambda: OPERATIONS[operation](backend, inputs))


def _print(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("| " + " | ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) + " |")
        if row is rows[0]:
            print("|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")


def _row(result: KernelTime) -> tuple[str, ...]:
    least, most = result.eager
    bounds = (result.hidden, result.graph)
    times = [f"{1e6 * t:.1f}" for t in (result.floor, *bounds)]
    ratios = " … ".join(f"{t / result.floor:.2f}" for t in bounds)
    eager = f"{1e6 * least:.0f} … {1e6 * most:.0f}"
    return result.operation, str(result.case), *times, ratios, eager, str(result.launches)


def main() -> None:
    """Print the modelled times, and the counts if asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels.roofline", description=__doc__)
    parser.add_argument("--all", action="store_true", help="every operation and batch, not only whole steps")
    parser.add_argument("--counts", action="store_true", help="also what simt counts, beside the formula (minutes)")
    options = parser.parse_args()
    names, batches = (list(OPERATIONS), (1, 4, 16, 64)) if options.all else (["step"], (1, 64))
    cases = [KernelCase(m, n, b) for m in MODELS for b in batches for n in VISUAL]
    print("Modelled for an H100 SXM, not measured; microseconds, bf16, a third of the visual tokens kept:\n")
    times = ("operation", "problem", "floor", "latency hidden", "not hidden", "/ floor", "eager", "launches")
    _print([times, *(_row(kernel_time(name, case)) for name in names for case in cases)])
    if not options.counts:
        return
    if simt_path() is None:
        raise SystemExit(f"No counts: {MISSING}.")
    print("\nCounted by simt at sm_90, bytes and warp instructions:\n")
    head = ("operation", "problem", "launches", "requested", "distinct", "formula", "in sectors", "warp instructions")
    table: list[tuple[str, ...]] = [head]
    for name in OPERATIONS:
        for case in (KernelCase(m, n) for m in MODELS for n in VISUAL if n <= AFFORDABLE):
            c = counted(name, case)
            sizes = c.launches, c.requested, c.minimal, distinct_bytes(name, case), 32 * c.sectors, c.instructions
            table.append((name, str(case), *map(str, sizes)))
    _print(table)


if __name__ == "__main__":
    main()
