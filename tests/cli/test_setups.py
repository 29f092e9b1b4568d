from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

import reroute
from reroute.cli.setups import ACTIONS, BUDGETS, TOLERANCE, Depth, Lineup, at_budget, lineup, own, yours
from reroute.demo import tinyvlm
from reroute.demo.tinyvlm.evaluation import prompts
from reroute.demo.tinyvlm.examples import examples
from reroute.errors import RerouteError
from reroute.report import Setup
from reroute.schedule_file import ScheduleFile

DEPTH = Depth(12, 144)


@pytest.mark.parametrize("folder", tinyvlm.CHECKPOINTS.values(), ids=tinyvlm.CHECKPOINTS)
def test_every_model_has_calibrated_rows_at_every_budget(folder: Path) -> None:
    rows = {(setup.action, setup.keep) for setup in lineup(DEPTH, folder).table if setup.method == "calibrated"}
    assert rows == set(product(ACTIONS, BUDGETS))


def test_every_row_runs_its_budget_as_the_handle_measures_it(ways: Lineup) -> None:
    model, processor = tinyvlm.load()
    inputs = prompts(model, processor, examples("validation", {"attr": 1}))
    for setup in (*ways.table[1:], *ways.first_cuts):
        with torch.no_grad(), reroute.enable(model, config=setup.config()) as handle:
            model(**inputs, use_cache=True, logits_to_keep=1)
        assert abs(handle.stats().keep - setup.keep) <= TOLERANCE * setup.keep, setup.name


def test_rows_and_gaps_make_a_whole_table(ways: Lineup) -> None:
    """Each method under each action at each budget, run or out of reach, and chance at all."""
    cells = [(setup.method, setup.action, setup.keep) for setup in (*ways.table[1:], *ways.missing)]
    assert len(set(cells)) == len(cells) == len(BUDGETS) * (5 * 2 + 1)
    assert {(setup.method, setup.keep) for setup in ways.missing} == {("fastv", 0.049), ("pdrop", 0.049)}


def test_first_cuts_differ_in_nothing_else(ways: Lineup) -> None:
    schedules = [setup.schedule for setup in ways.first_cuts]
    first = schedules[0]
    assert first is not None
    assert len(set(schedules)) == 5
    for schedule in schedules:
        assert schedule is not None
        same = replace(schedule, rankers=(first.rankers[0], *schedule.rankers[1:]))
        assert same == first


def test_a_budget_that_no_count_comes_near_to_is_refused() -> None:
    """7 and 8 of 144 are all that one decision has there."""
    setup = Setup("divprune", "remove", 0.052)
    with pytest.raises(RerouteError, match=r"DivPrune remove runs 4.86% .* 5.20%"):
        at_budget(setup, own(setup, DEPTH), DEPTH)


def test_one_stage_may_keep_a_token_more() -> None:
    """a, a, a/2, a/4 has steps of 6 % here."""
    setup = Setup("pdrop", "route", 0.11)
    schedule = at_budget(setup, own(setup, DEPTH), DEPTH).schedule
    assert schedule is not None
    assert schedule.counts(144) == (7, 7, 3, 2)


def test_without_files_there_are_no_calibrated_rows(tmp_path: Path) -> None:
    assert "calibrated" not in {setup.method for setup in lineup(DEPTH, tmp_path).table}


def test_ones_own_schedule_is_run_as_it_is(tmp_path: Path) -> None:
    grows = reroute.Schedule((1, 3), (0.1, 0.2))
    (setup,) = yours(ScheduleFile(tmp_path / "mine.json", grows), DEPTH)
    assert (setup.name, setup.schedule) == ("mine route", grows)
    assert setup.keep == pytest.approx((144 + 2 * 14 + 9 * 28) / 12 / 144)
    falls = replace(grows, ratios=(0.2, 0.1))
    assert [setup.action for setup in yours(ScheduleFile(tmp_path / "mine.json", falls), DEPTH)] == ["remove", "route"]
