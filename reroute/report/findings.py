"""Sentences that say what the table shows, whichever way it came out."""

from __future__ import annotations

from typing import Final

from .results import FAMILIES, Difference, Results

__all__ = ["findings"]

HARD: Final = [family for family in FAMILIES if not family.startswith("one-hop")]
EASY: Final = [family for family in FAMILIES if family.startswith("one-hop")]


def findings(results: Results) -> tuple[str, ...]:
    """On accuracy, on cost and, if removing at random was tried, on chance; all follow from ``results`` alone."""
    chance = (_on_chance(results),) if results.chances else ()
    return _on_accuracy(results), _on_cost(results), *chance


def _on_accuracy(results: Results) -> str:
    hard, easy = (results.difference(families, results.pairs) for families in (HARD, EASY))
    dense = results.accuracy(results.dense, HARD)
    head = {
        1: "Tokens that may come back help where importance moves with depth",
        0: "This run shows no clear gain from letting tokens come back",
        -1: "Against expectation, removing did better than routing",
    }[hard.verdict]
    control = {
        1: f"routing is ahead too, by {_points(easy)}",
        0: f"the two do not differ clearly ({_points(easy)})",
        -1: f"removing is ahead ({_points(easy)})",
    }[easy.verdict]
    return (
        f"{head}: on two-hop and riddle questions routing answered {hard.first:.0%} and removing {hard.second:.0%} "
        f"(dense {dense:.0%}; the same {hard.n} questions, mean over {len(results.pairs)} pairs of equal schedules, "
        f"difference {_points(hard)}), while on one-hop questions {control}."
    )


def _on_chance(results: Results) -> str:
    gap = results.difference(FAMILIES, results.chances)
    verdict = {
        1: "does better than",
        0: "does not differ clearly from",
        -1: "does worse than",
    }[gap.verdict]
    why = {
        1: "",
        0: "",
        -1: ": where the first decision falls, the last token does not look at what it will need, and a removed token "
        "cannot be fetched back",
    }[gap.verdict]
    return (
        f"Removing by attention {verdict} removing at random ({gap.first:.0%} against {gap.second:.0%} of all "
        f"questions, difference {_points(gap)}){why}."
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
