"""What was measured: ways to run a model, what each cost, how often each was right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import isclose, sqrt
from statistics import fmean, variance
from typing import TYPE_CHECKING, Final

from ..core.action import Action

if TYPE_CHECKING:
    from ..config import RoutingConfig
    from ..core.schedule import Schedule
    from ..demo.tinyvlm.evaluation import Outcome, Tally

__all__ = ["FAMILIES", "PUBLISHED", "Cost", "Difference", "Results", "Row", "Setup", "paired"]

FAMILIES: Final = (
    "one-hop grounding",
    "two-hop grounding",
    "riddle grounding",
    "one-hop VQA",
    "two-hop VQA",
    "riddle VQA",
)
"""The columns of the table, in order."""

_TITLES: Final = {
    "calibrated": "Calibrated",
    "cdpruner": "CDPruner",
    "dart": "DART",
    "diverse": "Diverse",
    "divprune": "DivPrune",
    "fastv": "FastV",
    "nuwa": "Nüwa",
    "pdrop": "PDrop",
    "random": "Random",
    "sparsevlm": "SparseVLM",
    "visionzip": "VisionZip",
    "vscan": "VScan",
}
PUBLISHED: Final = ("fastv", "pdrop")
"""Methods whose first decision is ranked by attention, on schedules that were made for larger models."""


@dataclass(frozen=True)
class Setup:
    """One way to run the model: a method, an action and a budget ``keep`` = avg_T / N; without a method, dense.

    ``schedule``: the decisions, instead of those of the method, which then is only a name; ``keep`` is their budget.
    """

    method: str | None = None
    action: Action = "route"
    keep: float = 1.0
    schedule: Schedule | None = None

    def config(self, backend: str = "auto", *, trace: bool = False) -> RoutingConfig:
        """The settings of routing; dense is a routing that keeps everything."""
        from ..config import RoutingConfig

        if self.schedule is not None:
            return RoutingConfig(action=self.action, schedule=self.schedule, backend=backend, trace=trace)
        return RoutingConfig(self.method, self.action, self.keep, backend=backend, trace=trace)

    @property
    def title(self) -> str:
        """The method as its authors write it."""
        return "dense" if self.method is None else _TITLES.get(self.method, self.method)

    @property
    def name(self) -> str:
        """Method and action."""
        return self.title if self.method is None else f"{self.title} {self.action}"

    @property
    def share(self) -> str:
        """``keep`` in whole percent."""
        return f"{100 * self.keep:.0f} %"

    @property
    def budget(self) -> str:
        """``keep`` as a simple fraction where it is one."""
        near = Fraction(self.keep).limit_denominator(9)
        return str(near) if isclose(near, self.keep, abs_tol=1e-9) else f"{self.keep:g}"


@dataclass(frozen=True)
class Cost:
    """Means over the timed prompts, each alone in its batch.

    - ``visual``: visual tokens N; ``avg_tokens``: avg_T, their number per layer, mean over all layers.
    - ``flops``: of the decoder's prefill, scoring included (computed); ``kv_bytes``: of the cache after it.
    - ``seconds``: median prefill; ``time_ratio``: median of its ratios to the dense prefill of the same round.
    """

    visual: float
    avg_tokens: float
    flops: float
    kv_bytes: float
    seconds: float
    time_ratio: float


@dataclass(frozen=True)
class Row:
    """A setup, what it cost, and its outcome for every question.

    ``cost`` is that of single prompts; ``batch_ratio`` is its ``time_ratio`` for a batch of ``Results.batch``.
    """

    setup: Setup
    cost: Cost
    batch_ratio: float
    outcomes: Sequence[Outcome]
    tallies: dict[str, Tally]


@dataclass(frozen=True)
class Difference:
    """Two setups on the same questions: accuracies, and their difference with the standard error of paired samples."""

    n: int
    first: float
    second: float
    error: float

    @property
    def value(self) -> float:
        """``first`` - ``second``."""
        return self.first - self.second

    @property
    def verdict(self) -> int:
        """1: the first is ahead by more than two standard errors; -1: the second is; 0: chance may explain it."""
        return (self.value > 2 * self.error) - (self.value < -2 * self.error)


@dataclass(frozen=True)
class Results:
    """All rows of the table, the dense one first. ``families[i]`` is the kind of question ``i``.

    - ``batch``: prompts in the batch that was timed; 0 if nothing was timed.
    - ``missing``: setups of the table whose budget is out of reach.
    - ``first_cuts``: rows that differ in what ranks their first decision, and in their action, and in nothing else.
    """

    families: Sequence[str]
    rows: Sequence[Row]
    batch: int
    missing: Sequence[Setup] = ()
    first_cuts: Sequence[Row] = ()

    @property
    def dense(self) -> Row:
        """The plain model."""
        return self.rows[0]

    @property
    def keeps(self) -> list[float]:
        """The budgets, in the order of the table."""
        return list(dict.fromkeys(row.setup.keep for row in self.rows if row.setup.method))

    @cached_property
    def pairs(self) -> list[tuple[Row, Row]]:
        """(route, remove) rows of one method and budget."""
        return _pairs(self.rows)

    @property
    def published(self) -> list[tuple[Row, Row]]:
        """Those ``pairs`` that run the ``PUBLISHED`` schedules."""
        return [pair for pair in self.pairs if pair[0].setup.method in PUBLISHED]

    @cached_property
    def cuts(self) -> list[tuple[Row, Row]]:
        """(route, remove) rows of one first decision, the one after which removing does worst first."""
        return sorted(_pairs(self.first_cuts), key=lambda pair: self.accuracy(pair[1]))

    @cached_property
    def best(self) -> list[tuple[Row, Row]]:
        """For each budget, the (route, remove) rows that answered most questions, other first cuts included."""
        found = []
        for keep in self.keeps:
            tried = (*self.rows, *self.first_cuts)
            rows = [row for row in tried if row.setup.method and row.setup.keep == keep]
            best = [
                max((row for row in rows if row.setup.action == action), key=self.accuracy, default=None)
                for action in ("route", "remove")
            ]
            if best[0] is not None and best[1] is not None:
                found.append((best[0], best[1]))
        return found

    def name_of(self, row: Row) -> str:
        """Method and action, or what ranks the first decision and the action."""
        is_cut = any(row is cut for cut in self.first_cuts)
        return f"first cut by {row.setup.name}" if is_cut else row.setup.name

    @cached_property
    def chances(self) -> list[tuple[Row, Row]]:
        """(remove on a published schedule, remove at random) rows of one budget."""
        removed = [row for row in self.rows if row.setup.action == "remove"]
        chance = {row.setup.keep: row for row in removed if row.setup.method == "random"}
        ranked = [row for row in removed if row.setup.method in PUBLISHED]
        return [(row, chance[row.setup.keep]) for row in ranked if row.setup.keep in chance]

    def accuracy(self, row: Row, families: Iterable[str] = FAMILIES) -> float:
        """Share of right answers to the questions of some families."""
        return fmean(row.outcomes[i].correct for i in self._of(families))

    def error(self, row: Row) -> float:
        """The standard error of the ``accuracy`` over all questions, whose families are as they are."""
        tallies = row.tallies.values()
        return sqrt(sum((t.n * t.standard_error) ** 2 for t in tallies)) / sum(t.n for t in tallies)

    def difference(self, families: Iterable[str], pairs: Sequence[tuple[Row, Row]]) -> Difference:
        """The first rows of ``pairs`` against the second: a question counts once, by its mean over all pairs."""
        questions = self._of(families)
        firsts = [fmean(first.outcomes[i].correct for first, _ in pairs) for i in questions]
        seconds = [fmean(second.outcomes[i].correct for _, second in pairs) for i in questions]
        return paired(firsts, seconds)

    def _of(self, families: Iterable[str]) -> list[int]:
        wanted = set(families)
        return [i for i, family in enumerate(self.families) if family in wanted]


def paired(firsts: Sequence[float], seconds: Sequence[float]) -> Difference:
    """Two setups by what each got for the same questions, one by one."""
    gaps = [a - b for a, b in zip(firsts, seconds, strict=True)]
    error = sqrt(variance(gaps) / len(gaps)) if len(gaps) > 1 else float("inf")
    return Difference(len(gaps), fmean(firsts), fmean(seconds), error)


def _pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    key: Callable[[Setup], object] = lambda setup: (setup.method, setup.keep)
    removed = {key(row.setup): row for row in rows if row.setup.method and row.setup.action == "remove"}
    routed = [row for row in rows if row.setup.method and row.setup.action == "route"]
    return [(row, removed[key(row.setup)]) for row in routed if key(row.setup) in removed]
