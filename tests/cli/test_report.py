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
from reroute.report import Answer, Page, Routed, Scene, Setup, charts, findings, html_table, text_table
from reroute.report.page import write
from reroute.report.results import FAMILIES, Results
from reroute.report.scene import Stage, stages_of
from reroute.trace import StageTrace, Trace


def helps(setup: Setup, family: str) -> float:
    return 0.4 if setup.action == "remove" and not family.startswith("one-hop") else 0.8


def equal(setup: Setup, family: str) -> float:
    return 0.8


def hurts(setup: Setup, family: str) -> float:
    return 0.4 if setup.method and setup.action == "route" else 0.8


@pytest.mark.parametrize(
    ("accuracy", "says"),
    [
        (helps, "Tokens that may come back help where importance moves with depth: "),
        (equal, "This run shows no clear gain from letting tokens come back: "),
        (hurts, "Against expectation, removing did better than routing: "),
    ],
)
def test_the_first_sentence_follows_the_accuracies(
    make_results: Callable[..., Results], accuracy: Callable[[Setup, str], float], says: str
) -> None:
    first, *_ = findings(make_results(accuracy))
    assert first.startswith(says)


@pytest.mark.parametrize(
    ("accuracy", "says"),
    [(helps, "the two do not differ clearly ("), (hurts, "removing is ahead (")],
)
def test_the_first_sentence_tells_of_one_hop_questions(
    make_results: Callable[..., Results], accuracy: Callable[[Setup, str], float], says: str
) -> None:
    assert f"while on one-hop questions {says}" in findings(make_results(accuracy))[0]


@pytest.mark.parametrize(
    ("ratio", "says"),
    [
        (0.5, "one prompt was faster (0.50 of the dense time), that of 16 at once faster (0.25"),
        (1.0, "one prompt was not clearly faster (1.00"),
        (2.4, "one prompt was slower (2.40 of the dense time), that of 16 at once slower (1.20"),
    ],
)
def test_the_second_sentence_follows_the_times(make_results: Callable[..., Results], ratio: float, says: str) -> None:
    _, second, *_ = findings(make_results(equal, ratio))
    assert "11% of the visual tokens" in second
    assert says in second


@pytest.mark.parametrize(
    ("chance", "says"), [(0.1, "does better than"), (0.4, "does not differ clearly from"), (0.8, "does worse than")]
)
def test_the_third_sentence_compares_with_chance(
    make_results: Callable[..., Results], chance: float, says: str
) -> None:
    def accuracy(setup: Setup, family: str) -> float:
        return chance if setup.method == "random" else 0.4

    _, _, third = findings(make_results(accuracy))
    assert third.startswith(f"Removing by attention {says} removing at random (")
    assert ("cannot be fetched back" in third) == (chance == 0.8)


def test_a_difference_is_paired(make_results: Callable[..., Results]) -> None:
    results = make_results(lambda setup, family: 1.0 if setup.action == "route" else 0.0)
    difference = results.difference(FAMILIES, results.pairs)
    assert (difference.value, difference.error, difference.verdict) == (1.0, 0.0, 1)
    assert difference.n == 40 * len(FAMILIES)
    assert len(results.pairs) == 6


def test_one_question_decides_nothing(make_results: Callable[..., Results]) -> None:
    single = make_results(helps, n=1)
    assert single.difference(["one-hop VQA"], single.pairs).verdict == 0


def test_the_table_has_a_line_per_setup(make_results: Callable[..., Results]) -> None:
    results = make_results(helps)
    lines = text_table(results).splitlines()
    assert len(lines) == 2 + len(results.rows) + 3
    assert max(map(len, lines)) <= 111
    dense = next(line for line in lines if line.startswith("dense"))
    tally = results.dense.tallies["two-hop VQA"]
    assert f"{100 * tally.accuracy:.0f}±{100 * tally.standard_error:.0f}" in dense
    assert html_table(results).count('scope="row"') == len(results.rows)
    assert charts(results).count("<svg") == 2 * len(FAMILIES)


def test_budgets_read_as_fractions_where_they_are() -> None:
    assert [Setup("pdrop", "route", keep).budget for keep in (1 / 3, 2 / 9, 0.33)] == ["1/3", "2/9", "0.33"]
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
    results = make_results(helps)
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
