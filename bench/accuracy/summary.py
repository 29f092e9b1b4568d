"""From answers to results, by condition: the same questions for every row."""

from __future__ import annotations

from collections.abc import Iterable

from reroute.demo.tinyvlm.evaluation import summarise_families
from reroute.demo.tinyvlm.questions import KINDS
from reroute.report import Results, Row, Setup

from .cells import Cell
from .records import Record
from .run import Runs

__all__ = ["results_of"]


def results_of(runs: Runs, missing: Iterable[Setup]) -> dict[str, Results]:
    """The results of every condition under which its cells have answers to the same questions.

    Cells that were asked nothing there are left out. Questions that one of the others was not asked yet are left out
    everywhere, so that all differences are paired.
    """
    found = {}
    for condition in dict.fromkeys(cell.condition for cell in runs.records):
        own = {cell: record for cell, record in runs.records.items() if cell.condition == condition and record.answers}
        asked = set.intersection(*(set(record.answers) for record in own.values())) if own else set()
        if not asked:
            continue
        order = sorted(asked, key=lambda question: (list(KINDS).index(question[0]), question[1]))
        families = [KINDS[kind].family for kind, _ in order]
        rows = {cell: _row(cell, record, order, families) for cell, record in own.items()}
        found[condition] = Results(
            families,
            [row for cell, row in rows.items() if cell.kind == "table"],
            0,
            tuple(missing),
            [row for cell, row in rows.items() if cell.kind == "first cut"],
        )
    return found


def _row(cell: Cell, record: Record, order: list[tuple[str, int]], families: list[str]) -> Row:
    assert record.cost is not None  # it is measured before the first answer
    outcomes = [record.answers[question].outcome for question in order]
    return Row(cell.setup, record.cost, 0.0, outcomes, summarise_families(families, outcomes))
