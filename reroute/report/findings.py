"""Sentences that say what the table shows, whichever way it came out."""

from __future__ import annotations

from .results import FAMILIES, Difference, Results

__all__ = ["findings"]


def findings(results: Results) -> tuple[str, ...]:
    """On first cuts, on the best of each action, on published schedules, on cost and on chance, as far as was tried.

    All of it follows from ``results`` alone.
    """
    tried = (
        (results.cuts, _on_first_cuts),
        (results.best, _on_the_best),
        (results.published, _on_published),
        (results.chances, _on_chance),
        (results.pairs and results.batch, _on_cost),
    )
    return tuple(say(results) for compared, say in tried if compared)


def _on_first_cuts(results: Results) -> str:
    gains = [results.difference(FAMILIES, [pair]) for pair in results.cuts]
    names = [pair[0].setup.title for pair in results.cuts]
    head = {
        1: "Routing is insurance against a bad first cut",
        0: "This run shows no clear gain from routing after a bad first cut",
        -1: "Against expectation, removing did better than routing after a bad first cut",
    }[gains[0].verdict]
    tail = {
        1: f"Routing is ahead even after the best of them, {names[-1]}",
        0: f"After the best of them, {names[-1]}, the two do not differ clearly: removal holds",
        -1: f"After the best of them, {names[-1]}, removing is ahead",
    }[gains[-1].verdict]
    cuts = "; ".join(
        f"{name} {_points(gain)} ({gain.first:.0%} against {gain.second:.0%})"
        for name, gain in zip(names, gains, strict=True)
    )
    return (
        f"{head}: with the same decisions and counts at {results.cuts[0][0].setup.share} of the visual tokens, routed "
        f"minus removed, by what ranks the first decision, is {cuts}. {tail}."
    )


def _on_the_best(results: Results) -> str:
    gains = [results.difference(FAMILIES, [pair]) for pair in results.best]
    shares = [pair[0].setup.share for pair in results.best]
    ahead = [share for share, gain in zip(shares, gains, strict=True) if gain.verdict > 0]
    behind = [share for share, gain in zip(shares, gains, strict=True) if gain.verdict < 0]
    if not ahead and not behind:
        head = "With the best that was tried for each action, removal holds as well as routing"
    elif not behind:
        head = f"With the best that was tried for each action, routing is ahead at {_listed(ahead)}" + (
            ", and removal holds at the other budgets" if len(ahead) < len(shares) else ""
        )
    else:
        head = f"With the best that was tried for each action, removing is ahead at {_listed(behind)}" + (
            f" and routing at {_listed(ahead)}" if ahead else ""
        )
    name = results.name_of
    points = "; ".join(
        f"{share} {_points(gain)} ({name(route)} {gain.first:.0%}, {name(remove)} {gain.second:.0%})"
        for share, gain, (route, remove) in zip(shares, gains, results.best, strict=True)
    )
    return f"{head}. Routed minus removed: {points}; dense {results.accuracy(results.dense):.0%}."


def _on_published(results: Results) -> str:
    gap = results.difference(FAMILIES, results.published)
    titles = " and ".join(dict.fromkeys(route.setup.title for route, _ in results.published))
    verdict = {
        1: "depends on whether tokens may come back",
        0: "does not clearly depend on whether tokens may come back",
        -1: "is better off with removal",
    }[gap.verdict]
    keeps = [route.setup.keep for route, _ in results.published]
    removed = {remove.setup.keep: remove for _, remove in results.best}
    better = results.difference(
        FAMILIES, [(removed[k], own) for k, (_, own) in zip(keeps, results.published, strict=True)]
    )
    why = ""
    if gap.verdict > 0 and better.verdict > 0:
        why = (
            " That is a fault of these schedules on this model, and not of removal as such: at the same budgets the "
            f"best removal answers {better.first:.0%}."
        )
    return (
        f"With {titles}, on schedules made for 32 layers and scaled to this model, accuracy {verdict}: routed "
        f"{gap.first:.0%}, removed {gap.second:.0%} (mean over {len(results.published)} pairs, difference "
        f"{_points(gap)}).{why}"
    )


def _on_chance(results: Results) -> str:
    gap = results.difference(FAMILIES, results.chances)
    verdict = {
        1: "does better than",
        0: "does not differ clearly from",
        -1: "does worse than",
    }[gap.verdict]
    return (
        f"Removing on these schedules {verdict} removing at random before the first layer ({gap.first:.0%} against "
        f"{gap.second:.0%} of all questions, difference {_points(gap)})."
    )


def _points(difference: Difference) -> str:
    return f"{100 * difference.value:+.1f} ± {100 * difference.error:.1f} points"


def _on_cost(results: Results) -> str:
    smallest = min(row.setup.keep for row in results.rows)
    rows = [row for row, _ in results.pairs if row.setup.keep == smallest]
    dense = results.dense.cost
    tokens = _range([row.cost.avg_tokens / dense.visual for row in rows])
    flops = _range([row.cost.flops / dense.flops for row in rows])
    memory = _range([row.cost.kv_bytes / dense.kv_bytes for row in rows])
    single = _pace([row.cost.time_ratio for row in rows])
    batched = _pace([row.batch_ratio for row in rows])
    return (
        f"At the smallest budget routing ran {tokens} of the visual tokens per layer, with {flops} of the FLOPs of a "
        f"dense prefill and {memory} of its KV cache; on this machine its prefill of one prompt was {single}, that of "
        f"{results.batch} at once {batched}."
    )


def _listed(names: list[str]) -> str:
    """One, two and three."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _pace(ratios: list[float]) -> str:
    """How times compare with dense ones; less than 5 % is taken for noise."""
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    times = low if low == high else f"{low} to {high}"
    if max(ratios) < 0.95:
        return f"faster ({times} of the dense time)"
    if min(ratios) > 1.05:
        return f"slower ({times} of the dense time)"
    return f"not clearly faster ({times} of the dense time)"


def _range(shares: list[float]) -> str:
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return low if low == high else f"{low} to {high}"
