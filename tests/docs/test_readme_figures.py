"""The accuracies of README are those of the page of results, which `make accuracy` writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODELS = ("labels", "text")


def rows(page: str, head: str) -> Iterator[list[str]]:
    """The cells of the table whose first line begins with ``head``, without bold type."""
    _, _, table = page.partition(f"| {head}")
    for line in table.partition("\n\n")[0].splitlines()[2:]:
        yield [cell.strip().replace("*", "") for cell in line.strip("|").split("|")]


@pytest.fixture(scope="module")
def readme() -> str:
    return (ROOT / "README.md").read_text()


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def clean(model: str) -> str:
    """The results of a model on clean pictures."""
    page = (ROOT / "docs/results/accuracy.md").read_text()
    return page.partition(f"\n## {model}\n")[2].partition("### clean")[2].partition("\n### ")[0]


def test_first_decisions(readme: str, model: str, clean: str) -> None:
    start = 1 + 3 * MODELS.index(model)
    quoted = {row[0]: row[start : start + 3] for row in rows(readme, "first decision by")}
    found = {name: [a.split()[0], b.split()[0], gain] for name, a, b, gain in rows(clean, "first decision at 11 % by")}
    assert quoted == found
    assert len(found) == 5


def test_methods(readme: str, model: str, clean: str) -> None:
    lines = list(rows(clean, " |"))
    found = {(line[0], line[1]): line[2:] for line in lines}
    start = 1 + 3 * MODELS.index(model)
    quoted = list(rows(readme, "removed → routed"))
    assert len(quoted) == 7
    for name, *cells in quoted:
        method = name.partition(",")[0]
        removed, routed = (found[method, action] for action in ("remove", "route"))
        for cell, column in zip(cells[start - 1 : start + 2], (0, 2, 3), strict=True):
            both = [values[column].partition(" ")[0] for values in (removed, routed)]
            assert cell == (" → ".join(both) if both[0] else "-"), (method, column)


def test_how_many_questions(readme: str, clean: str) -> None:
    n = clean.partition("n = ")[2].partition(" ")[0]
    dense = clean.partition("Dense: ")[2].partition(".\n")[0]
    assert f"n = {n} of each" in readme
    assert dense in readme


def test_first_decisions_under_other_conditions(readme: str, model: str) -> None:
    page = (ROOT / "docs/results/accuracy.md").read_text().partition(f"\n## {model}\n")[2]
    start = 1 + 3 * MODELS.index(model)
    quoted = {row[0]: row[start : start + 3] for row in rows(readme, "routed - removed | `labels`: noise")}
    found: dict[str, list[str]] = {}
    for condition in ("noise-0.5", "noise-1", "clutter"):
        section = page.partition(f"### {condition}: ")[2].partition("\n### ")[0]
        for name, _, _, gain in rows(section, "first decision at 11 % by"):
            points = round(float(gain.split()[0]))
            found.setdefault(name, []).append(f"{points:+d}" if points else "0")
    assert quoted == found
    assert len(found) == 5
