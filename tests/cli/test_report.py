from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from reroute.errors import RerouteError
from reroute.files import check_writable
from reroute.report import (
    Answer,
    Page,
    Routed,
    Scene,
    Setup,
    charts,
    findings,
    html_cuts,
    html_table,
    paired,
    text_cuts,
    text_table,
)
from reroute.report.page import write
from reroute.report.results import FAMILIES, Results
from reroute.report.scene import Stage, stages_of
from reroute.trace import StageTrace, Trace


def equal(setup: Setup, family: str) -> float:
    return 0.8


def with_gains(**gains: float) -> Callable[[Setup, str], float]:
    """0.5 for removing, and more for routing by method."""
    return lambda setup, family: 0.5 + gains.get(setup.method or "", 0.0) * (setup.action == "route")


def said(results: Results, about: str) -> str:
    """The only sentence that holds these words."""
    (sentence,) = (sentence for sentence in findings(results) if about in sentence)
    return sentence


@pytest.mark.parametrize(
    ("norm", "diversity", "head", "tail"),
    [
        (0.3, 0.0, "Routing is insurance against a bad first cut: ", "the two do not differ clearly: removal holds."),
        (
            0.3,
            0.3,
            "Routing is insurance against a bad first cut: ",
            "Routing is ahead even after the best of them, div",
        ),
        (0.3, -0.3, "Routing is insurance against a bad first cut: ", "diversity, removing is ahead."),
        (0.0, 0.0, "This run shows no clear gain from routing after a bad first cut: ", "removal holds."),
        (-0.3, 0.0, "Against expectation, removing did better than routing after a bad first cut: ", "removal holds."),
    ],
)
def test_whether_routing_insures_follows_from_the_worst_and_the_best_first_cut(
    make_results: Callable[..., Results], norm: float, diversity: float, head: str, tail: str
) -> None:
    removed = {"norm": 0.3, "diversity": 0.7}

    def accuracy(setup: Setup, family: str) -> float:
        gain = {"norm": norm, "diversity": diversity}.get(setup.method or "", 0.0)
        return removed.get(setup.method or "", 0.5) + gain * (setup.action == "route")

    sentence = said(make_results(accuracy, n=100), "first decision, is norm")
    assert sentence.startswith(head)
    assert tail in sentence


@pytest.mark.parametrize(
    ("gain", "low", "says"),
    [
        (0.0, 0.0, "removal holds as well as routing. "),
        (0.4, 0.4, "routing is ahead at 33 %, 22 %, 11 % and 5 %. "),
        (0.0, 0.4, "routing is ahead at 5 %, and removal holds at the other budgets. "),
        (-0.4, 0.4, "removing is ahead at 33 %, 22 % and 11 % and routing at 5 %. "),
        (-0.4, -0.4, "removing is ahead at 33 %, 22 %, 11 % and 5 %. "),
    ],
)
def test_the_best_of_both_actions_are_compared(
    make_results: Callable[..., Results], gain: float, low: float, says: str
) -> None:
    def accuracy(setup: Setup, family: str) -> float:
        return 0.5 + (low if setup.keep < 0.1 else gain) * (setup.action == "route")

    results = make_results(accuracy, n=100)
    sentence = said(results, "best that was tried")
    assert sentence.startswith(f"With the best that was tried for each action, {says}Routed minus removed: 33 % ")
    for route, remove in results.best:
        tried = (*results.rows, *results.first_cuts)
        rows = [row for row in tried if row.setup.method and row.setup.keep == route.setup.keep]
        assert max(results.accuracy(row) for row in rows) in (results.accuracy(route), results.accuracy(remove))


@pytest.mark.parametrize(
    ("gain", "other", "says", "blames"),
    [
        (0.4, 0.3, "depends on whether tokens may come back: ", True),
        (0.4, 0.0, "depends on whether tokens may come back: ", False),
        (0.0, 0.3, "does not clearly depend on whether tokens may come back: ", False),
        (-0.4, 0.3, "is better off with removal: ", False),
    ],
)
def test_a_fault_of_published_schedules_is_none_of_removal_where_other_removal_does_better(
    make_results: Callable[..., Results], gain: float, other: float, says: str, blames: bool
) -> None:
    def accuracy(setup: Setup, family: str) -> float:
        is_published = setup.method in ("fastv", "pdrop")
        return 0.5 + (gain if setup.action == "route" else 0.0) if is_published else 0.5 + other

    def worst(setup: Setup, family: str) -> float:
        return accuracy(setup, family) if other or setup.method in ("fastv", "pdrop", None) else 0.1

    sentence = said(make_results(worst, n=100), "made for 32 layers")
    assert says in sentence
    assert ("not of removal as such: at the same budgets the best removal answers" in sentence) == blames
    assert "mean over 6 pairs" in sentence


@pytest.mark.parametrize(
    ("ratio", "says"),
    [
        (0.5, "one prompt was faster (0.50 of the dense time), that of 16 at once faster (0.25"),
        (1.0, "one prompt was not clearly faster (1.00"),
        (2.4, "one prompt was slower (2.40 of the dense time), that of 16 at once slower (1.20"),
    ],
)
def test_the_sentence_on_cost_follows_the_times(make_results: Callable[..., Results], ratio: float, says: str) -> None:
    sentence = said(make_results(equal, ratio), "At the smallest budget")
    assert "5% of the visual tokens" in sentence
    assert says in sentence


@pytest.mark.parametrize(
    ("chance", "says"), [(0.1, "does better than"), (0.4, "does not differ clearly from"), (0.8, "does worse than")]
)
def test_published_removal_is_compared_with_chance(
    make_results: Callable[..., Results], chance: float, says: str
) -> None:
    def accuracy(setup: Setup, family: str) -> float:
        return chance if setup.method == "random" else 0.4

    sentence = said(make_results(accuracy), "removing at random")
    assert sentence.startswith(f"Removing on these schedules {says} removing at random before the first layer (")


def test_the_best_may_be_another_first_cut(make_results: Callable[..., Results]) -> None:
    """Removing after a good first cut is removing too, whatever the table shows."""

    def accuracy(setup: Setup, family: str) -> float:
        return 0.95 if (setup.method, setup.action) == ("norm", "remove") else 0.5

    results = make_results(accuracy, n=100)
    assert ", first cut by norm remove 9" in said(results, "best that was tried")
    (_, remove) = next(pair for pair in results.best if pair[0].setup.keep == 0.11)
    assert remove.setup.method == "norm"


def test_without_a_comparison_there_is_no_sentence(make_results: Callable[..., Results]) -> None:
    whole = make_results(equal)
    assert findings(Results(whole.families, whole.rows[:1], 16)) == ()


def test_paired_samples_by_hand() -> None:
    """Gaps 1, 0, 0 and 1: mean 1/2, variance 1/3, standard error sqrt(1/12); unpaired it would be 0.354."""
    difference = paired([1, 1, 0, 1], [0, 1, 0, 0])
    assert (difference.n, difference.first, difference.second, difference.value) == (4, 0.75, 0.25, 0.5)
    assert difference.error == pytest.approx(12**-0.5)
    assert difference.verdict == 0
    assert paired([1], [0]).verdict == 0


def test_a_difference_is_paired(make_results: Callable[..., Results]) -> None:
    results = make_results(lambda setup, family: 1.0 if setup.action == "route" else 0.0)
    difference = results.difference(FAMILIES, results.pairs)
    assert (difference.value, difference.error, difference.verdict) == (1.0, 0.0, 1)
    assert difference.n == 40 * len(FAMILIES)
    assert len(results.published) == 6
    assert all(route.setup.keep == remove.setup.keep for route, remove in results.pairs)


def test_one_question_decides_nothing(make_results: Callable[..., Results]) -> None:
    single = make_results(equal, n=1)
    assert single.difference(["one-hop VQA"], single.pairs).verdict == 0


def test_the_table_has_a_line_per_setup(make_results: Callable[..., Results]) -> None:
    results = make_results(equal)
    lines = text_table(results).splitlines()
    assert len(lines) == 2 + len(results.rows) + len(results.keeps) + len(results.missing)
    assert max(map(len, lines)) <= 125
    dense = next(line for line in lines if line.startswith("dense"))
    tally = results.dense.tallies["two-hop VQA"]
    assert f"{100 * tally.accuracy:.0f}±{100 * tally.standard_error:.0f}" in dense
    assert html_table(results).count('scope="row"') == len(results.rows) + len(results.missing)
    assert charts(results).count("<svg") == len({route.setup.method for route, _ in results.pairs}) * len(FAMILIES)


def test_what_is_out_of_reach_stands_in_its_block(make_results: Callable[..., Results]) -> None:
    results = make_results(equal)
    lines = text_table(results).splitlines()
    last = lines.index("5 % of the visual tokens per layer")
    missing = [line.split()[:2] for line in lines if "out of reach" in line]
    assert missing == [[name, action] for name in ("FastV", "PDrop") for action in ("remove", "route")]
    assert all("out of reach" not in line for line in lines[:last])
    assert html_table(results).count("out of reach") == 4


def test_a_chart_has_a_place_for_each_budget(make_results: Callable[..., Results]) -> None:
    """FastV cannot run the last budget, and its marks stay where the first three are."""
    drawn = charts(make_results(equal)).split("<h3>")
    fastv, diverse = (next(part for part in drawn if part.startswith(name)) for name in ("FastV", "Diverse"))
    places = [set(re.findall(r'circle class="mark route" cx="([\d.]+)"', part)) for part in (fastv, diverse)]
    assert len(places[1]) == 4
    assert sorted(map(float, places[0])) == sorted(map(float, places[1]))[:3]


def test_first_cuts_are_shown_with_their_difference(make_results: Callable[..., Results]) -> None:
    results = make_results(with_gains(norm=0.4, attention=0.4), n=100)
    lines = text_cuts(results).splitlines()
    assert len(lines) == 1 + 5
    gain = results.difference(FAMILIES, [pair for pair in results.cuts if pair[0].setup.method == "norm"])
    line = next(line for line in lines if line.startswith("  norm"))
    assert line.endswith(f"{100 * gain.value:+.1f} ± {100 * gain.error:.1f}")
    assert html_cuts(results).count("<tr>") == 1 + 5
    removed = [results.accuracy(remove) for _, remove in results.cuts]
    assert removed == sorted(removed)


def test_budgets_read_as_fractions_where_they_are() -> None:
    assert [Setup("pdrop", "route", keep).budget for keep in (1 / 3, 2 / 9, 0.33)] == ["1/3", "2/9", "0.33"]
    assert [Setup("pdrop", "route", keep).share for keep in (1 / 3, 0.049)] == ["33 %", "5 %"]
    assert Setup("mine", "remove").name == "mine remove"


def decision(layer: int, kept: list[int], candidates: list[int]) -> StageTrace:
    scores = torch.linspace(0, 1, len(candidates))
    return StageTrace(layer, (torch.tensor(kept),), (torch.tensor(candidates),), (scores,))


def test_tokens_that_were_deferred_and_run_again_are_back() -> None:
    everyone = [0, 1, 2, 3]
    stages = (decision(2, [0, 1], everyone), decision(4, [1, 2], everyone), decision(5, [0, 2], everyone))
    trace = Trace(stages, (torch.arange(4),))
    found = stages_of(trace, layers=8)
    assert [(s.first, s.last) for s in found] == [(0, 1), (2, 3), (4, 4), (5, 7)]
    assert [s.kept for s in found] == [(0, 1, 2, 3), (0, 1), (1, 2), (0, 2)]
    assert [s.back for s in found] == [(), (), (2,), (0, 2)]
    assert [str(s) for s in found] == ["0-1: 4", "2-3: 2", "4: 2 (1 back)", "5-7: 2 (2 back)"]


def test_only_candidates_have_scores() -> None:
    trace = Trace((decision(0, [1, 3], [0, 1, 2, 3]), decision(1, [3], [1, 3])), (torch.arange(4),))
    first, last = stages_of(trace, layers=2)
    assert first.first == 0
    assert last.scores == (None, 0.0, None, 1.0)
    assert list(base64.b64decode(last.to_json()["heat"])) == [0, 1, 0, 255]


def test_negative_scores_span_the_scale_too() -> None:
    levels = base64.b64decode(Stage(0, 1, (0,), (), (-2.0, None, 2.0)).to_json()["heat"])
    assert list(levels) == [1, 0, 255]


def page(question: str = "where ?") -> Page:
    stage = Stage(0, 1, (0, 1))
    run = Routed(Setup("fastv", "route", 0.5), Answer("here"), [stage])
    scene = Scene(Image.new("RGB", (8, 4)), (1, 2), 2, "kind", question, [run], Answer("there", (0, 0, 1, 1)))
    return Page(question, "lead", [scene], "scenes", "<table></table>", ["note"])


def test_a_question_cannot_break_out_of_the_page() -> None:
    evil = "</script><script>alert(1)</script> $title & <b>"
    text = page(evil).render()
    assert "<script>alert" not in text
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert data
    assert json.loads(data[1])["scenes"][0]["question"] == evil


def test_the_page_asks_for_nothing(make_results: Callable[..., Results]) -> None:
    results = make_results(equal)
    text = Page("t", "l", page().scenes, "s", html_table(results), ["n"], charts(results), findings(results)).render()
    assert not re.findall(r"https?://(?!www\.w3\.org)|@import|url\((?!data:)|<link|src=\"(?!data:)", text)
    assert "default-src 'none'" in text


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(RerouteError, match="No space left"):
        write(page(), tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written_are_found_early(tmp_path: Path) -> None:
    check_writable(tmp_path / "page.html")
    assert not list(tmp_path.iterdir())
    for path, why in [(tmp_path, "a folder"), (tmp_path / "a" / "b", "does not exist"), (Path("/dev/null"), "regular")]:
        with pytest.raises(RerouteError, match=why):
            check_writable(path)
