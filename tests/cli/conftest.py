from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from reroute.cli.setups import Depth, Lineup, lineup
from reroute.demo.tinyvlm import CHECKPOINTS
from reroute.demo.tinyvlm.evaluation import Outcome, tally
from reroute.report import Cost, Results, Row, Setup
from reroute.report.results import FAMILIES

Accuracy = Callable[[Setup, str], float]


@pytest.fixture(scope="session")
def ways() -> Lineup:
    """All setups of the demo."""
    return lineup(Depth(12, 144), CHECKPOINTS["labels"])


@pytest.fixture
def make_results(ways: Lineup) -> Callable[..., Results]:
    """Results with the accuracies and the time ratios asked for, at reproducible random."""

    def make(accuracy: Accuracy, time_ratio: float = 0.8, n: int = 40) -> Results:
        families = [family for family in FAMILIES for _ in range(n)]

        def row(setup: Setup) -> Row:
            draw = random.Random(setup.name + setup.share)
            boxes = [family.endswith("grounding") for family in families]
            right = [draw.random() < accuracy(setup, family) for family in families]
            outcomes = [Outcome(r, 0.8 * r if box else None) for r, box in zip(right, boxes, strict=True)]
            cost = Cost(144, 144 * setup.keep, 1e9 * setup.keep, 2e6 * setup.keep, 0.1, 1.0)
            cost = cost if setup.method is None else replace(cost, time_ratio=time_ratio)
            tallies = {f: tally([o for o, g in zip(outcomes, families, strict=True) if g == f]) for f in FAMILIES}
            return Row(setup, cost, cost.time_ratio / 2, outcomes, tallies)

        first_cuts = [row(setup) for setup in ways.first_cuts]
        return Results(families, [row(setup) for setup in ways.table], 16, ways.missing, first_cuts)

    return make
