"""Ask what was not asked yet: some questions of every family to all cells, then the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from reroute.cli.demo import family_counts
from reroute.cli.measure import costs, routed
from reroute.cli.tower import Seen
from reroute.demo.tinyvlm.conditions import CONDITIONS
from reroute.demo.tinyvlm.digits import Split
from reroute.demo.tinyvlm.evaluation import answers, prompts, score
from reroute.demo.tinyvlm.examples import Example
from reroute.report import Setup

from .cells import Cell, Checkpoint
from .records import Answered, Record, key_of

__all__ = ["CHUNK", "Runs", "run"]

CHUNK: Final = 50
"""Questions of each family that all cells are asked before any is asked more: what an interruption leaves can be
compared."""
BATCH: Final = 50
COUNTED: Final = 4
"""Prompts whose cost is measured, one by one."""

Asked = tuple[tuple[str, int], Example]
"""A question's kind and number in it, and the question."""


@dataclass
class Runs:
    """The records of one checkpoint. ``seconds``: what asking took, and ``asked``: how many answers that gave."""

    checkpoint: Checkpoint
    records: dict[Cell, Record] = field(default_factory=dict)
    asked: int = 0
    seconds: float = 0.0


def run(
    checkpoint: Checkpoint,
    cells: Sequence[Cell],
    folder: Path,
    *,
    n: int,
    split: Split,
    seed: int,
    progress: Callable[[str], object],
) -> Runs:
    """Answers of all cells to ``n`` questions of every family, those that ``folder`` holds included."""
    runs = Runs(checkpoint)
    for cell in cells:
        head = key_of(checkpoint, cell, split, seed)
        same = (record for record in runs.records.values() if record.head == head)
        runs.records[cell] = next(same, None) or Record.open(folder, head)
    for start, chunk in _chunks(n):
        for condition in dict.fromkeys(cell.condition for cell in cells):
            own = [cell for cell in cells if cell.condition == condition]
            asked = _questions(condition, start, chunk, split, seed)
            seen = Seen(checkpoint.model)
            for number, cell in enumerate(own, 1):
                begin = time.perf_counter()
                runs.asked += (new := _ask(checkpoint, cell, runs.records[cell], asked, seen))
                runs.seconds += time.perf_counter() - begin if new else 0.0
                if new:
                    name = f"{cell.setup.name}{'' if cell.setup.method is None else f' at {cell.setup.share}'}"
                    progress(
                        f"{checkpoint.name}, questions up to {start + chunk} of {n}, {condition}, "
                        f"{number} of {len(own)}: {name}, {runs.asked / runs.seconds:.0f} answers a second"
                    )
    return runs


def _chunks(n: int) -> Iterator[tuple[int, int]]:
    return ((start, min(CHUNK, n - start)) for start in range(0, n, CHUNK))


def _questions(condition: str, start: int, count: int, split: Split, seed: int) -> list[Asked]:
    """The questions after the first ``start`` of every family."""
    before, after = family_counts(start), family_counts(start + count)
    drawn = CONDITIONS[condition].examples(split, after, seed)
    numbered: dict[str, int] = {}
    found = []
    for example in drawn:
        number = numbered.get(example.kind, 0)
        numbered[example.kind] = number + 1
        if number >= before[example.kind]:
            found.append(((example.kind, number), example))
    return found


def _ask(checkpoint: Checkpoint, cell: Cell, record: Record, asked: Sequence[Asked], seen: Seen) -> int:
    """Put those questions to a cell that it has no answer to; how many these are."""
    new = [(question, example) for question, example in asked if question not in record.answers]
    if not new:
        return 0
    model, processor = checkpoint.model, checkpoint.processor
    with CONDITIONS[cell.condition].on(model):
        if record.cost is None:
            single = [prompts(model, processor, [example]) for _, example in new[:: -(-len(new) // COUNTED)]]
            *_, cost = costs(model, single, [Setup(), cell.setup], "torch", rounds=1)
            record.measured(cost)
        with routed(model, cell.setup, "torch"), seen.reused(cell.setup):
            for start in range(0, len(new), BATCH):
                batch = new[start : start + BATCH]
                texts = answers(model, processor, [example for _, example in batch], BATCH)
                record.add(
                    Answered(*question, text, score(example, text))
                    for (question, example), text in zip(batch, texts, strict=True)
                )
    return len(new)
