from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.accuracy import __main__ as command
from bench.accuracy import records
from bench.accuracy import run as running
from bench.accuracy.cells import Cell, Checkpoint, Grid, grid
from bench.accuracy.records import Record, key_of
from bench.accuracy.run import Runs, run
from bench.accuracy.summary import results_of
from reroute.cli import tower
from reroute.demo.tinyvlm.evaluation import prompts
from reroute.demo.tinyvlm.examples import examples
from reroute.methods import METHODS, Diverse
from reroute.rankers import RandomScores
from reroute.report import Setup
from reroute.report.results import FAMILIES


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.load("labels")


@pytest.fixture(scope="module")
def cells(checkpoint: Checkpoint) -> list[Cell]:
    """Dense, a method under both actions, and a first cut under both."""
    found = grid(checkpoint, ["clean"], ["diverse"]).cells
    low = [cell for cell in found if cell.setup.keep == 0.049 or cell.setup.method in (None, "norm")]
    assert [cell.setup.name for cell in low] == [
        "dense",
        *("Diverse remove", "Diverse route"),
        *("norm remove", "norm route"),
    ]
    return low


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "CHUNK", 1)
    monkeypatch.setattr(running, "COUNTED", 1)


def ask(
    checkpoint: Checkpoint,
    cells: list[Cell],
    folder: Path,
    n: int,
    progress: Callable[[str], object] = lambda line: None,
) -> Runs:
    return run(checkpoint, cells, folder, n=n, split="validation", seed=1, progress=progress)


def lines(folder: Path) -> dict[str, list[Any]]:
    """What the files say, without times, which no two runs share."""
    found = {}
    for path in folder.iterdir():
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.name] = [entry for entry in entries if "cost" not in entry]
    return found


def test_an_interrupted_run_goes_on_and_ends_as_one_that_was_not(
    checkpoint: Checkpoint, cells: list[Cell], tmp_path: Path
) -> None:
    whole = ask(checkpoint, cells[:3], tmp_path / "whole", 2)
    assert whole.asked == 3 * 2 * 6

    def interrupt(line: str) -> None:
        if "up to 2 of 2, clean, 2 of 3" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(checkpoint, cells[:3], tmp_path / "cut", 2, interrupt)
    for path in (tmp_path / "cut").iterdir():  # a last line that was not written to its end
        path.write_bytes(path.read_bytes()[:-7])
    rest = ask(checkpoint, cells[:3], tmp_path / "cut", 2)
    assert rest.asked == 6 + 3
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert ask(checkpoint, cells[:3], tmp_path / "cut", 2).asked == 0


def test_more_questions_are_those_that_were_asked_and_others(
    checkpoint: Checkpoint, cells: list[Cell], tmp_path: Path
) -> None:
    ask(checkpoint, cells[1:2], tmp_path, 1)
    before = lines(tmp_path)
    assert ask(checkpoint, cells[1:2], tmp_path, 2).asked == 6
    after = lines(tmp_path)
    for name, entries in before.items():
        assert after[name][: len(entries)] == entries
        questions = [(entry["kind"], entry["number"]) for entry in after[name][1:]]
        assert len(set(questions)) == len(questions) == 12


def test_cells_that_run_alike_are_asked_once(checkpoint: Checkpoint, cells: list[Cell], tmp_path: Path) -> None:
    """The first cut by diversity is Diverse itself."""
    alike = [cells[1], replace(cells[1], kind="first cut")]
    found = ask(checkpoint, alike, tmp_path, 1)
    assert found.asked == 6
    assert [len(found.records[cell].answers) for cell in alike] == [6, 6]


def test_what_is_remembered_of_the_tower_changes_no_answer(
    checkpoint: Checkpoint, cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "BATCH", 3)  # two batches, which must not be taken for one another
    ran: list[int] = []
    patches = next(x for x in checkpoint.model.model.vision_tower.modules() if isinstance(x, torch.nn.Conv2d))
    hook = patches.register_forward_hook(lambda *given: ran.append(1))
    ask(checkpoint, cells, tmp_path / "remembered", 1)
    with_memory = len(ran)
    monkeypatch.setattr(tower, "MOST", 0)
    ask(checkpoint, cells, tmp_path / "run", 1)
    hook.remove()
    assert lines(tmp_path / "remembered") == lines(tmp_path / "run")
    assert len(ran) - with_memory == with_memory + 2 * (len(cells) - 1)


def test_rankers_that_look_into_the_tower_see_it_run(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (cell,) = (
        c for c in grid(checkpoint, ["clean"], ["nuwa"]).cells if c.setup.name == "Nüwa remove" and c.setup.keep == 0.11
    )
    assert ask(checkpoint, [Cell("clean", Setup()), cell], tmp_path, 1).asked == 12


def test_a_method_that_is_registered_has_cells_and_makes_no_other_anew(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = grid(checkpoint, ["clean"]).cells
    monkeypatch.setitem(METHODS, "mine", Mine)
    after = grid(checkpoint, ["clean"]).cells
    assert [cell for cell in after if cell.setup.method != "mine"] == list(before)
    assert {cell.setup.action for cell in after if cell.setup.method == "mine"} == {"remove", "route"}


def test_what_the_model_cannot_run_is_no_cell(checkpoint: Checkpoint) -> None:
    """It has no text tower, and is asked before anything runs for hours."""
    found = grid(checkpoint, ["clean"], ["cdpruner"])
    assert "cdpruner" not in {cell.setup.method for cell in found.cells}
    assert all("no text tower" in why for _, why in found.missing)
    assert len(found.missing) == 8


@dataclass(frozen=True)
class Mine(Diverse):
    """A method of another package."""

    name = "mine"


def test_what_answers_depend_on_is_in_the_key(
    checkpoint: Checkpoint, cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, remove, route, *_ = cells
    assert route.setup.schedule is not None
    other = replace(route.setup, schedule=replace(route.setup.schedule, rankers=(RandomScores(),)))
    noisy = replace(route, condition="noise-1")
    keys = [key_of(checkpoint, cell, "test", 1) for cell in (dense, remove, route, noisy, replace(route, setup=other))]
    keys += [key_of(checkpoint, route, "test", 2), key_of(checkpoint, route, "validation", 1)]
    assert len({Record.open(tmp_path, key).path for key in keys}) == len(keys)
    assert key_of(checkpoint, route, "test", 1)["code"] == keys[2]["code"]
    digest = records._digest_of
    monkeypatch.setattr(records, "_digest_of", lambda path: "new" if path.name == "diversity.py" else digest(path))
    assert key_of(checkpoint, route, "test", 1)["code"] != keys[2]["code"]
    assert key_of(checkpoint, dense, "test", 1)["code"] == keys[0]["code"]


def test_only_questions_that_all_rows_have_answered_are_compared(
    checkpoint: Checkpoint, cells: list[Cell], tmp_path: Path
) -> None:
    ask(checkpoint, cells[:2], tmp_path, 2)
    runs = ask(checkpoint, cells, tmp_path, 1)
    assert {len(record.answers) for record in runs.records.values()} == {12, 6}
    (results,) = results_of(runs, ()).values()
    assert sorted(results.families) == sorted(FAMILIES)
    assert [len(row.outcomes) for row in (*results.rows, *results.first_cuts)] == [6] * 5
    ((route, remove),) = results.pairs
    assert (route.setup.action, remove.setup.action) == ("route", "remove")
    common = set(runs.records[cells[4]].answers)
    expected = [a.outcome.correct for question, a in runs.records[cells[0]].answers.items() if question in common]
    assert sum(outcome.correct for outcome in results.dense.outcomes) == sum(expected)


def test_costs_are_measured_once(checkpoint: Checkpoint, cells: list[Cell], tmp_path: Path) -> None:
    (record,) = ask(checkpoint, cells[1:2], tmp_path, 1).records.values()
    assert record.cost is not None
    assert record.cost.avg_tokens / 144 == pytest.approx(0.049, rel=0.02)
    (again,) = ask(checkpoint, cells[1:2], tmp_path, 2).records.values()
    assert again.cost == record.cost


def test_the_page_follows_from_the_answers_with_or_without_curves(
    checkpoint: Checkpoint,
    cells: list[Cell],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    missing = ((Setup("pdrop", "route", 0.049), "keep is out of reach."),)
    monkeypatch.setattr(command, "grid", lambda *given: Grid(tuple(cells), missing))
    monkeypatch.setattr(Checkpoint, "load", lambda folder: checkpoint)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = ["--runs", str(tmp_path / "runs"), "--docs", str(tmp_path / "docs"), "--threads", "1"]
    command.main(["--n", "1", *options])
    assert "No curves" in capsys.readouterr().out
    text = (tmp_path / "docs/results/accuracy.md").read_text(encoding="utf-8")
    assert "n = 1 questions of each family" in text
    assert "| Diverse | remove |" in text
    assert "| norm |" in text
    assert "- PDrop route at 5 %: keep is out of reach." in text
    assert "![" not in text
    command.main(["--only-page", *options])
    assert (tmp_path / "docs/results/accuracy.md").read_text(encoding="utf-8") == text
    command.main(["--only-page", *options, "--seed", "5"])
    assert "no question was answered yet" in capsys.readouterr().out


def test_curves_are_the_same_for_the_same_answers(checkpoint: Checkpoint, cells: list[Cell], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `figures` is not installed")
    from bench.accuracy.figures import COSTS, draw

    results = results_of(ask(checkpoint, cells, tmp_path, 1), ())
    for cost in COSTS:
        paths = [tmp_path / f"{cost}{i}.svg" for i in range(2)]
        for path in paths:
            draw(results, cost, path)
        assert paths[0].read_bytes() == paths[1].read_bytes()
        assert "% of dense" in paths[0].read_text(encoding="utf-8")


def test_a_batch_has_a_picture_per_question(checkpoint: Checkpoint) -> None:
    """What the noise relies on: pictures of a batch are in the order of its questions."""
    inputs = prompts(checkpoint.model, checkpoint.processor, examples("validation", {"attr": 2}))
    assert len(inputs["pixel_values"]) == len(inputs["input_ids"]) == 2
