"""Long rows under load: launches of two streams and of two threads at once always give the same bits.

The stages of a long row wait for each other inside their launch, and only a GPU runs several launches at a time.
Elsewhere the smallest case runs twice, one launch after the other, with rows that are made to count as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from cases import ScoreCase, ScoreShape, exact, same

from reroute_kernels import Selection, SelectRows

KERNEL = "select"
OPERATIONS = ("score_topk", "select", "select of a crowd")
Run = Callable[[], Selection]
Streams = Sequence["torch.cuda.Stream | None"]


@pytest.fixture
def shortest(executor: Any, kernel: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Candidates of the shortest row that has several stages: 4097 on a GPU."""
    if executor.kind != "cuda":
        monkeypatch.setattr(kernel, "MAX_ONE_PROGRAM", 128)
        monkeypatch.setattr(kernel, "CHUNK", 64)
    return int(kernel.MAX_ONE_PROGRAM) + 1


def decide(
    ops: Any, device: torch.device, operation: str, visual: int, batch: int, seed: int = 0
) -> tuple[Run, SelectRows]:
    """A decision to make again and again, and what it selects from. The counts are uploaded once."""
    torch.manual_seed(seed)
    counts = [visual, 70, visual // 2, 0, visual - 1][:batch]
    lengths, keep = [n + 60 for n in counts], [n // 3 for n in counts]
    inputs = ScoreCase(lengths, counts, keep, ScoreShape(dtype=torch.bfloat16)).inputs(device)
    metadata = inputs.rows.metadata
    rows = inputs.rows._replace(metadata=replace(metadata, on_device=metadata.counts(device)))
    if operation == "score_topk":
        return partial(ops.score_topk, *inputs._replace(rows=rows)), rows
    scores = torch.randn(batch, visual)
    if operation == "select of a crowd":  # one coarse bin holds all
        scores = torch.rand(batch, visual) / 4 + 0.25
    return partial(ops.select, scores.to(device), rows), rows


def streams_of(executor: Any, count: int) -> Streams:
    """``count`` streams of a GPU; elsewhere none."""
    if executor.kind != "cuda":
        return [None]
    torch.cuda.synchronize()  # what they read is there
    return [torch.cuda.Stream() for _ in range(count)]


def repeated(executor: Any, run: Run, streams: Streams) -> Iterator[Selection]:
    """The results of 200 launches in alternation over ``streams``, 20 in flight; elsewhere of two."""
    rounds, flight = (10, 20) if executor.kind == "cuda" else (1, 2)
    for _ in range(rounds):
        results = []
        for i in range(flight):
            with torch.cuda.stream(streams[i % len(streams)]):
                results.append(run())
        if executor.kind == "cuda":
            torch.cuda.synchronize()
        yield from results


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("times", [1, 4, 16])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_two_streams(
    ops: Any, executor: Any, device: torch.device, operation: str, shortest: int, times: int, batch: int
) -> None:
    """Rows of 4097, 16384 and 65536 candidates."""
    if executor.kind != "cuda" and times * batch > 1:
        pytest.skip("of a GPU: takes too long elsewhere")
    run, rows = decide(ops, device, operation, max(times * (shortest - 1), shortest), batch)
    results = repeated(executor, run, streams_of(executor, 2))
    first = next(results)
    exact(rows, first)
    for other in results:
        same(other, first)


@pytest.mark.parametrize("shared", [False, True], ids=["a stream each", "one stream"])
def test_two_threads(ops: Any, executor: Any, device: torch.device, shortest: int, shared: bool) -> None:
    """Each with a decision of its own; elsewhere one after the other."""
    if executor.kind != "cuda" and shared:
        pytest.skip("of a GPU: nothing else has streams")
    tasks = [decide(ops, device, "score_topk", shortest, 1, seed) for seed in range(2)]
    streams = streams_of(executor, 1 if shared else 2)
    with ThreadPoolExecutor(2 if executor.kind == "cuda" else 1) as threads:
        work = lambda i: list(repeated(executor, tasks[i][0], [streams[i % len(streams)]]))
        results = list(threads.map(work, range(2)))
    for (_, rows), (first, *others) in zip(tasks, results, strict=True):
        exact(rows, first)
        for other in others:
            same(other, first)
