"""The table of a demo, for terminals and for the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Final

from .results import FAMILIES, Cost, Difference, Results, Row, Setup

if TYPE_CHECKING:
    from ..demo.tinyvlm.evaluation import Tally

__all__ = ["html_costs", "html_cuts", "html_table", "text_costs", "text_cuts", "text_table"]

OUT_OF_REACH: Final = "out of reach: the layers before its first decision alone run more"

_GROUNDING: Final = [family for family in FAMILIES if family.endswith("grounding")]
_VQA: Final = [family for family in FAMILIES if family.endswith("VQA")]


def text_table(results: Results) -> str:
    """One line per setup, about 125 characters wide."""
    dense = results.dense.cost
    times = f"{'1':>7}{results.batch:>6}"
    lines = [
        f"{'':20}{'avg_T':>6}  {'grounding: Acc@0.5 %, mean IoU':32}{'VQA: accuracy %':24}{'mean':8}"
        f"{'prefill':>9}{'KV cache':>10}{'prefill time':>13}",
        f"{'':20}{f'of {dense.visual:.0f}':>6}  {_heads(_GROUNDING, 10)}  {_heads(_VQA, 8)}{'of 6':8}"
        f"{'GFLOP':>9}{'KiB':>10}{times}",
    ]
    for budget, rows in _by_budget(results):
        if budget:
            lines.append(f"{budget} of the visual tokens per layer")
        for row in rows:
            boxes = "".join(_grounding(row.tallies[f]) for f in _GROUNDING)
            words = "".join(f"{_percent(row.tallies[f]):8}" for f in _VQA)
            mean = f"{100 * results.accuracy(row):.0f}±{100 * results.error(row):.1f}"
            spent = f"{_flops(row.cost, dense):>9}{_memory(row.cost, dense):>10}"
            times = f"{row.cost.time_ratio:7.2f}{row.batch_ratio:6.2f}"
            lines.append(f"{_label(row.setup):20}{row.cost.avg_tokens:6.1f}  {boxes}  {words}{mean:8}{spent}{times}")
        lines += [f"{_label(setup):20}{'-':>6}  {OUT_OF_REACH}" for setup in _missing(results, rows)]
    return "\n".join(lines)


def text_cuts(results: Results) -> str:
    """A line for each first decision: removed, routed, and the paired difference."""
    gains = [(remove.setup.title, results.difference(FAMILIES, [(route, remove)])) for route, remove in results.cuts]
    head = f"{'first decision by':26}{'removed %':>10}{'routed %':>10}{'routed - removed':>20}"
    return "\n".join([head, *(f"  {name:24}{''.join(_cut(gain))}" for name, gain in gains)])


def _cut(gain: Difference) -> tuple[str, str, str]:
    return (
        f"{100 * gain.second:>10.1f}",
        f"{100 * gain.first:>10.1f}",
        f"{100 * gain.value:>+14.1f} ± {100 * gain.error:.1f}",
    )


def html_cuts(results: Results) -> str:
    """The same as a ``<table>``; nothing if no first decision was tried."""
    if not results.cuts:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(remove.setup.title)}</th>'
        + "".join(f"<td>{cell}</td>" for cell in _cut(results.difference(FAMILIES, [(route, remove)])))
        + "</tr>"
        for route, remove in results.cuts
    )
    names = ("first decision by", "removed, %", "routed, %", "routed - removed ± s.e.")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    share = results.cuts[0][0].setup.share
    return (
        f"<h3>Same decisions and counts at {share}, another first cut</h3>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )


def _label(setup: Setup) -> str:
    return setup.title if setup.method is None else f"  {setup.title:10} {setup.action}"


def _missing(results: Results, rows: list[Row]) -> list[Setup]:
    """Setups of the budget of ``rows`` that cannot be."""
    keep = rows[0].setup.keep if rows[0].setup.method else None
    return [setup for setup in results.missing if setup.keep == keep]


def _heads(families: list[str], width: int) -> str:
    return "".join(f"{family.split()[0]:{width}}" for family in families)


def _grounding(tally: Tally) -> str:
    return f"{_percent(tally):6}{_fraction(tally.mean_iou):4}"


def _percent(tally: Tally) -> str:
    return f"{100 * tally.accuracy:.0f}±{100 * tally.standard_error:.0f}"


def _fraction(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}".removeprefix("0")


def _flops(cost: Cost, dense: Cost) -> str:
    return f"{cost.flops / 1e9:.2f} {cost.flops / dense.flops:4.0%}"


def _memory(cost: Cost, dense: Cost) -> str:
    return f"{cost.kv_bytes / 1024:.0f} {cost.kv_bytes / dense.kv_bytes:4.0%}"


def _by_budget(results: Results) -> Iterator[tuple[str, list[Row]]]:
    budget: Callable[[Row], str] = lambda row: row.setup.share if row.setup.method else ""
    for name, rows in groupby(results.rows, budget):
        yield name, list(rows)


def text_costs(costs: Sequence[tuple[Setup, Cost]]) -> str:
    """One line per setup, dense first, without accuracies."""
    dense = costs[0][1]
    width = max(15, *(len(setup.name) + 2 for setup, _ in costs))
    head = f"{'':{width}}{'avg_T':>6}{'prefill GFLOP':>16}{'KV cache KiB':>15}{'prefill ms':>12}{'÷ dense':>9}"
    return "\n".join(
        [head]
        + [
            f"{setup.name:{width}}{cost.avg_tokens:6.1f}{_flops(cost, dense):>16}{_memory(cost, dense):>15}"
            f"{1e3 * cost.seconds:12.1f}{cost.time_ratio:9.2f}"
            for setup, cost in costs
        ]
    )


def html_costs(costs: Sequence[tuple[Setup, Cost]]) -> str:
    """The same as a ``<table>``."""
    dense = costs[0][1]
    names = ("avg_T", "prefill FLOPs", "KV cache", "prefill", "÷ dense")
    units = (f"of {dense.visual:.0f}", "with scoring, computed", "measured", "measured, median", "median of ratios")
    head = "".join(f'<th scope="col">{n}<small>{u}</small></th>' for n, u in zip(names, units, strict=True))
    rows = "".join(
        _html_cells(
            setup,
            [
                f"{cost.avg_tokens:.1f}",
                *_html_spent(cost, dense),
                f"{1e3 * cost.seconds:.1f} ms",
                f"{cost.time_ratio:.2f}",
            ],
        )
        for setup, cost in costs
    )
    return f'<table><thead><tr><th scope="col">setup</th>{head}</tr></thead><tbody>{rows}</tbody></table>'


def html_table(results: Results) -> str:
    """The same numbers as a ``<table>``, with the number of questions in the head."""
    tallies = results.dense.tallies
    kinds = "".join(
        f'<th scope="col">{escape(family.split()[0])}<small>n = {tallies[family].n}</small></th>'
        for family in (*_GROUNDING, *_VQA)
    )
    bodies = "".join(_html_group(budget, rows, results) for budget, rows in _by_budget(results))
    return f"""<table>
<thead>
<tr><th rowspan="2" scope="col">setup</th>
<th rowspan="2" scope="col">avg_T<small>of {results.dense.cost.visual:.0f}</small></th>
<th colspan="{len(_GROUNDING)}" scope="colgroup">grounding<small>Acc@0.5 ± s.e. in %, mean IoU</small></th>
<th colspan="{len(_VQA)}" scope="colgroup">VQA<small>accuracy ± s.e. in %</small></th>
<th rowspan="2" scope="col">mean<small>± s.e. in %</small></th>
<th rowspan="2" scope="col">prefill FLOPs<small>with scoring, computed</small></th>
<th rowspan="2" scope="col">KV cache<small>measured</small></th>
<th rowspan="2" scope="col">prefill time<small>measured, ÷ dense:<br>1 prompt, {results.batch} at once</small></th></tr>
<tr>{kinds}</tr>
</thead>
{bodies}
</table>"""


def _html_group(budget: str, rows: list[Row], results: Results) -> str:
    columns = 6 + len(FAMILIES)
    head = (
        f'<tr class="group"><th colspan="{columns}" scope="rowgroup">{budget} of the visual tokens per layer</th></tr>'
    )
    shown = "".join(_html_row(row, results) for row in rows)
    absent = "".join(
        f'<tr><th scope="row">{escape(setup.name)}</th><td colspan="{columns}">{OUT_OF_REACH}</td></tr>'
        for setup in _missing(results, rows)
    )
    return f"<tbody>{head if budget else ''}{shown}{absent}</tbody>"


def _html_row(row: Row, results: Results) -> str:
    grounding = [f"{_html_percent(row.tallies[f])} <i>{_fraction(row.tallies[f].mean_iou)}</i>" for f in _GROUNDING]
    words = [_html_percent(row.tallies[f]) for f in _VQA]
    mean = f"<b>{100 * results.accuracy(row):.1f}</b><small>±{100 * results.error(row):.1f}</small>"
    spent = _html_spent(row.cost, results.dense.cost)
    times = f"{row.cost.time_ratio:.2f} <i>{row.batch_ratio:.2f}</i>"
    return _html_cells(row.setup, [f"{row.cost.avg_tokens:.1f}", *grounding, *words, mean, *spent, times])


def _html_spent(cost: Cost, dense: Cost) -> tuple[str, str]:
    return (
        f"{cost.flops / 1e9:.3g} G <i>{cost.flops / dense.flops:.0%}</i>",
        f"{cost.kv_bytes / 1024:.0f} KiB <i>{cost.kv_bytes / dense.kv_bytes:.0%}</i>",
    )


def _html_cells(setup: Setup, cells: Sequence[str]) -> str:
    kind = setup.method if setup.method == "random" else "dense" if setup.method is None else setup.action
    values = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr class="{kind}"><th scope="row">{escape(setup.name)}</th>{values}</tr>'


def _html_percent(tally: Tally) -> str:
    return f"<b>{100 * tally.accuracy:.0f}</b><small>±{100 * tally.standard_error:.0f}</small>"
