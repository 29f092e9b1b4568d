"""The page of the results, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from reroute.demo.tinyvlm.conditions import CONDITIONS
from reroute.report import Difference, Results, Row, Setup, findings
from reroute.report.results import FAMILIES

__all__ = ["page"]

Missing = Sequence[tuple[Setup, str]]

HEAD = """# Accuracy

Every method of the registry, removing and routing, at equal measured budgets, on held-out pictures, and under harder
conditions. Written by `make accuracy`; [what the rows are, and what this is not](../design/accuracy.md).

Mean accuracy over six families of questions in %, ± one binomial standard error. *Routed - removed*: the paired
difference on the same questions, ± its standard error; in bold where it exceeds two of these. With so many cells one in
twenty does so by chance. A condition has the rows that were asked under it.
"""


def page(models: Mapping[str, tuple[Mapping[str, Results], Missing]], about: str, figures: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        models: of each checkpoint the results by condition, and what cannot be.
        about: a sentence on how it was made.
        figures: titles by the path that a link takes.
    """
    parts = [HEAD, f"{about}\n"]
    parts += [f"![{title}]({path})\n" for path, title in figures.items()]
    for name, (conditions, missing) in models.items():
        parts.append(f"## {name}\n")
        for condition, results in conditions.items():
            n = min(results.families.count(family) for family in FAMILIES)
            parts.append(f"### {condition}: {CONDITIONS[condition].about}\n")
            parts.append(f"n = {n} questions of each family. Dense: {_accuracy(results, results.dense)}.\n")
            parts.append("\n".join(f"- {sentence}" for sentence in findings(results)) + "\n")
            parts.append(_table(_accuracies(results)))
            parts.append(_table(_cuts(results)))
        parts.append(f"### {name}: what the rows cost\n")
        parts.append(_table(_costs(next(iter(conditions.values())))))
        if missing:
            parts.append("Not possible:\n")
            parts.append("\n".join(f"- {s.name} at {s.share}: {why}" for s, why in missing) + "\n")
    return "\n".join(parts)


def _accuracies(results: Results) -> Iterator[Sequence[str]]:
    yield ["", "", *(f"{100 * keep:.0f} %" for keep in results.keeps)]
    rows = {(row.setup.method, row.setup.action, row.setup.keep): row for row in results.rows}
    for method in dict.fromkeys(row.setup.method for row in results.rows if row.setup.method):
        title = Setup(method).title
        pairs = {route.setup.keep: (route, remove) for route, remove in results.pairs if route.setup.method == method}
        for action in ("remove", "route"):
            own = [rows.get((method, action, keep)) for keep in results.keeps]
            if any(own):
                yield [title, action, *(_accuracy(results, row) if row else "" for row in own)]
        if pairs:
            gains = {keep: results.difference(FAMILIES, [pair]) for keep, pair in pairs.items()}
            yield ["", "routed - removed", *(_gain(gains[keep]) if keep in gains else "" for keep in results.keeps)]


def _cuts(results: Results) -> Iterator[Sequence[str]]:
    share = results.cuts[0][0].setup.share
    yield [f"first decision at {share} by", "remove", "route", "routed - removed"]
    for route, remove in results.cuts:
        gain = results.difference(FAMILIES, [(route, remove)])
        yield [remove.setup.title, _accuracy(results, remove), _accuracy(results, route), _gain(gain)]


def _costs(results: Results) -> Iterator[Sequence[str]]:
    yield ["", "asked", "avg_T", "FLOPs / dense", "KV bytes / dense"]
    dense = results.dense.cost
    for row in results.rows:
        cost = row.cost
        shares = (f"{cost.flops / dense.flops:.3f}", f"{cost.kv_bytes / dense.kv_bytes:.3f}")
        yield [row.setup.name, row.setup.share, f"{cost.avg_tokens:.2f}", *shares]


def _accuracy(results: Results, row: Row) -> str:
    return f"{100 * results.accuracy(row):.1f} ± {100 * results.error(row):.1f}"


def _gain(gain: Difference) -> str:
    text = f"{100 * gain.value:+.1f} ± {100 * gain.error:.1f}"
    return f"**{text}**" if gain.verdict else text


def _table(rows: Iterable[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body)) + "\n"
