"""What is searched over: lists of decisions that meet the budget. Whatever a decision gets besides belongs here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import ceil
from random import Random
from typing import Any, NamedTuple

from ..core.moving import moved
from ..core.schedule import Action, Schedule
from ..core.solver import scale_ratios
from ..errors import RerouteError
from ..methods import Diverse, FastV, Method, PDrop
from ..rankers import RANKERS, LastTokenAttention, Ranker

__all__ = ["Proposal", "Space", "Step"]

ALLOW_NONE = False
"""Whether a stage may keep no visual token."""
MAX_DECISIONS = 6
"""A decision costs FLOPs that the budget does not count."""
FACTORS = (1 / 4, 1 / 2, 2 / 3, 3 / 2, 2.0, 4.0)
"""By which a move scales the share of one stage, before all are scaled to the budget again."""
TRIES = 500
"""After which all proposals near the best ones count as known."""


class Step(NamedTuple):
    """One decision: before ``layer``, ``ratio`` of the prompt's visual tokens are kept, the best by ``ranker``."""

    layer: int
    ratio: float
    ranker: Ranker = LastTokenAttention()


@dataclass(frozen=True)
class Proposal:
    """Decisions by layer."""

    steps: tuple[Step, ...]

    @classmethod
    def of(cls, schedule: Schedule) -> Proposal:
        """The decisions of ``schedule``."""
        return cls(tuple(map(Step, schedule.layers, schedule.ratios, schedule.rankers)))

    @classmethod
    def read(cls, written: Any) -> Proposal:
        """The proposal that ``written`` was."""
        return cls(tuple(Step(int(layer), float(ratio), RANKERS.built(by)) for layer, ratio, by in written))

    def written(self) -> list[list[Any]]:
        """As JSON holds it."""
        return [[step.layer, step.ratio, RANKERS.named(step.ranker)] for step in self.steps]

    @property
    def schedule(self) -> Schedule:
        """As models are routed by it."""
        layers, ratios, rankers = zip(*self.steps, strict=True)
        return Schedule(layers, ratios, rankers)

    def __str__(self) -> str:
        """Layer by layer, such as ``2: 0.3125, 7: 0.1562``; what ranks only where not all are ranked alike."""
        alike = len({step.ranker for step in self.steps}) == 1
        return ", ".join(
            f"{step.layer}: {step.ratio:.4g}{'' if alike else f' {type(step.ranker).__name__}'}" for step in self.steps
        )


@dataclass(frozen=True)
class Space:
    """The proposals of a budget: all run ``keep`` = avg_T / N on ``num_layers`` layers.

    ``visual``: the numbers N of visual tokens that prompts have. Proposals with equal counts are one. ``methods``: a
    search begins with their schedules; whatever ranks one of their decisions may rank any. ``may_decide``: before which
    layers of the model it may.
    """

    keep: float
    num_layers: int
    action: Action
    visual: tuple[int, ...]
    methods: tuple[Method, ...] = (PDrop(), FastV(), Diverse())
    may_decide: Callable[[int, Ranker], bool] = lambda layer, ranker: True

    @cached_property
    def rankers(self) -> tuple[Ranker, ...]:
        """What may rank a decision."""
        found = (step.ranker for start in self.starts() for step in start.steps)
        return tuple(dict.fromkeys(found))

    @property
    def last_first_layer(self) -> int:
        """The last layer before which a first decision still meets the budget."""
        return ceil(self.keep * self.num_layers) - 1

    def published(self) -> dict[str, Schedule]:
        """The schedules of the methods at this budget, where they reach it, by name."""
        return {name: its for name, its in self._tried().items() if isinstance(its, Schedule)}

    def left_out(self) -> list[str]:
        """Which of the methods have none, and why."""
        failures = {name: its for name, its in self._tried().items() if not isinstance(its, Schedule)}
        return [f"{name} is left out: {error}" for name, error in failures.items()]

    def _tried(self) -> dict[str, Schedule | RerouteError]:
        found: dict[str, Schedule | RerouteError] = {}
        for method in self.methods:
            try:
                solved = method.with_budget(self.keep, self.num_layers, self.action)
                found[method.name] = self._movable(solved.schedule(self.num_layers, self.action))
            except RerouteError as error:
                found[method.name] = error.with_traceback(None)
        return found

    def starts(self) -> list[Proposal]:
        """Where a search begins: the published schedules, or where none reaches the budget one that does."""
        found = [Proposal.of(schedule) for schedule in self.published().values()]
        if found:
            return found
        any_that_does = Schedule((0, self.num_layers // 4 or 1), (1.0, 0.5))
        return [self.refilled(Proposal.of(moved(any_that_does, self.num_layers, self.may_decide)).steps)]

    def _movable(self, schedule: Schedule) -> Schedule:
        """``schedule`` where its decisions may be made. RerouteError if the budget cannot be met there."""
        return moved(schedule, self.num_layers, self.may_decide, self.keep)

    def refilled(self, steps: Iterable[Step]) -> Proposal:
        """A proposal with the proportions and the rankers of ``steps`` that meets the budget.

        Raises:
            RerouteError: there is none.
        """
        steps = sorted(steps)
        ratios: Sequence[float] = [step.ratio for step in steps]
        if self.action == "remove":  # no token comes back
            ratios = list(accumulate(ratios, min))
        layers = [step.layer for step in steps]
        scaled = scale_ratios(ratios, layers, self.num_layers, self.keep)
        return Proposal(tuple(step._replace(ratio=ratio) for step, ratio in zip(steps, scaled, strict=True)))

    def key(self, proposal: Proposal) -> Any:
        """Equal for proposals that run the same."""
        schedule = proposal.schedule
        return schedule.layers, schedule.rankers, tuple(schedule.counts(n) for n in self.visual)

    def near(self, parents: Sequence[Proposal], known: set[Any], random: Random) -> Proposal | None:
        """A proposal a move or more away from one of ``parents`` whose key is not in ``known``, if one is found."""
        for _ in range(TRIES):
            steps = list(random.choice(parents).steps)
            steps = self._moved(steps, random)
            while random.random() < 1 / 3:
                steps = self._moved(steps, random)
            try:
                proposal = self.refilled(steps)
                is_new = self.key(proposal) not in known
            except RerouteError:  # out of reach, or a ranker that cannot decide there
                continue
            if is_new and self._is_sound(proposal):
                return proposal
        return None

    def _is_sound(self, proposal: Proposal) -> bool:
        """Whether each decision may be made, and no stage keeps more than its share, as one rounded up to a token."""
        least = min(self.visual)
        if not all(self.may_decide(step.layer, step.ranker) for step in proposal.steps):
            return False
        return all(step.ratio * least >= 1 or (ALLOW_NONE and step.ratio == 0) for step in proposal.steps)

    def _moved(self, steps: list[Step], random: Random) -> list[Step]:
        moves = [self._shift, self._scale, self._add, self._drop]
        if len(self.rankers) > 1:
            moves.append(self._rank)
        return random.choice(moves)(steps, random)

    def _shift(self, steps: list[Step], random: Random) -> list[Step]:
        index = random.randrange(len(steps))
        from_layer, ranker = steps[index].layer, steps[index].ranker
        later = random.choice((-1, 1)) > 0
        others = range(from_layer + 1, self.num_layers) if later else range(from_layer - 1, -1, -1)
        layer = next((other for other in others if self.may_decide(other, ranker)), None)
        if layer is None or layer in (step.layer for step in steps):
            return steps
        return [*steps[:index], steps[index]._replace(layer=layer), *steps[index + 1 :]]

    def _scale(self, steps: list[Step], random: Random) -> list[Step]:
        index = random.randrange(len(steps))
        factor = random.choice((0.0, *FACTORS) if ALLOW_NONE else FACTORS)
        ratio = steps[index].ratio * factor or factor / min(self.visual)  # from none to a few
        return [*steps[:index], steps[index]._replace(ratio=ratio), *steps[index + 1 :]]

    def _add(self, steps: list[Step], random: Random) -> list[Step]:
        open_to_any = (x for x in range(self.num_layers) if any(self.may_decide(x, ranker) for ranker in self.rankers))
        free = sorted(set(open_to_any) - {step.layer for step in steps})
        if len(steps) >= MAX_DECISIONS or not free:
            return steps
        layer = random.choice(free)
        before = max((step for step in steps if step.layer < layer), default=steps[0])
        return sorted([*steps, before._replace(layer=layer, ratio=before.ratio * random.choice(FACTORS))])

    def _rank(self, steps: list[Step], random: Random) -> list[Step]:
        index = random.randrange(len(steps))
        others = [ranker for ranker in self.rankers if ranker != steps[index].ranker]
        return [*steps[:index], steps[index]._replace(ranker=random.choice(others)), *steps[index + 1 :]]

    def _drop(self, steps: list[Step], random: Random) -> list[Step]:
        if len(steps) == 1:
            return steps
        index = random.randrange(len(steps))
        return steps[:index] + steps[index + 1 :]
