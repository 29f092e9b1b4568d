"""Accuracy against budget: one small chart per method and kind of question, as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

from .results import FAMILIES, Results, Row, Setup

__all__ = ["charts"]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 160, 130, 26, 4, 8, 22
KEY: Final = (
    "<p>Right answers in % against the budget avg_T / N in %; bars and band: ± one standard error.</p>"
    '<ul class="key"><li class="route"><b>●</b> route</li><li class="remove"><b>■</b> remove</li>'
    '<li class="random"><b>✕</b> random, remove</li><li class="dense"><b>━</b> dense</li></ul>'
)
MARKS: Final = {"route": "circle", "remove": "square", "random": "cross"}


def charts(results: Results) -> str:
    """A row of charts for each method that was both routed and removed, and their key."""
    methods = dict.fromkeys(route.setup.method for route, _ in results.pairs)
    return KEY + "".join(_row(results, method) for method in methods if method)


def _row(results: Results, method: str) -> str:
    panels = "".join(_panel(results, method, family) for family in FAMILIES)
    title = escape(Setup(method).title)
    return f'<h3>{title}</h3><div class="charts">{panels}</div>'


def _panel(results: Results, method: str, family: str) -> str:
    dense = results.dense.tallies[family]
    lines = [
        ("random", [row for row in results.rows if row.setup.method == "random"]),
        ("remove", _rows(results, method, "remove")),
        ("route", _rows(results, method, "route")),
    ]
    shown = [row for _, rows in lines for row in rows]
    keeps = results.keeps
    low, high = _y(dense.accuracy - dense.standard_error), _y(dense.accuracy + dense.standard_error)
    band = f'<rect class="band" x="{LEFT}" y="{high:.1f}" width="{WIDTH - LEFT - RIGHT}" height="{low - high:.1f}"/>'
    series = "".join(_series(name, rows, family, keeps) for name, rows in lines if rows)
    figures = (f"{row.setup.name} at {row.setup.share} {row.tallies[family].accuracy:.0%}" for row in shown)
    label = f"{family}: {'; '.join(figures)}"
    return (
        f"<figure><figcaption>{escape(family)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{_axes(keeps)}{band}{_line('dense', [(LEFT, _y(dense.accuracy)), (WIDTH - RIGHT, _y(dense.accuracy))])}"
        f"{series}</svg></figure>"
    )


def _rows(results: Results, method: str, action: str) -> list[Row]:
    return [row for row in results.rows if row.setup.method == method and row.setup.action == action]


def _axes(keeps: Sequence[float]) -> str:
    grid = "".join(
        f'<path class="grid" d="M{LEFT} {_y(v / 100):.1f}H{WIDTH - RIGHT}"/>'
        f'<text class="y" x="{LEFT - 5}" y="{_y(v / 100) + 3.5:.1f}">{v}</text>'
        for v in (0, 50, 100)
    )
    names = "".join(
        f'<text class="x" x="{_x(i, len(keeps)):.1f}" y="{HEIGHT - 7}">{100 * k:.0f}</text>'
        for i, k in enumerate(keeps)
    )
    return grid + names


def _series(name: str, rows: Sequence[Row], family: str, keeps: Sequence[float]) -> str:
    tallies = [row.tallies[family] for row in rows]
    places = [_x(keeps.index(row.setup.keep), len(keeps)) for row in rows]
    points = [(x, _y(t.accuracy)) for x, t in zip(places, tallies, strict=True)]
    errors = "".join(
        f'<path class="error {name}" d="M{x:.1f} {_y(t.accuracy - t.standard_error):.1f}'
        f'V{_y(t.accuracy + t.standard_error):.1f}"/>'
        for (x, _), t in zip(points, tallies, strict=True)
    )
    return errors + _line(name, points) + "".join(_mark(name, x, y) for x, y in points)


def _line(name: str, points: Sequence[tuple[float, float]]) -> str:
    return f'<path class="line {name}" d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in points)}"/>'


def _mark(name: str, x: float, y: float) -> str:
    shape = MARKS[name]
    if shape == "circle":
        return f'<circle class="mark {name}" cx="{x:.1f}" cy="{y:.1f}" r="3.6"/>'
    if shape == "square":
        return f'<rect class="mark {name}" x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6"/>'
    return f'<path class="mark {name}" d="M{x - 3:.1f} {y - 3:.1f}l6 6m0 -6l-6 6"/>'


def _x(index: int, count: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (index + 0.5) / count


def _y(share: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(1.0, max(0.0, share)))
