"""Hill climbing: each proposal is a move away from one of the best so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from statistics import fmean

from ..core.schedule import Action, Schedule
from .proposal import Proposal, Space

__all__ = ["Evaluation", "best_of", "climb"]

PARENTS = 6
"""How many of the best are moved away from."""


@dataclass(frozen=True)
class Evaluation:
    """A proposal and its divergence on each prompt, in nats."""

    proposal: Proposal
    divergences: tuple[float, ...]

    @property
    def mean(self) -> float:
        """What is minimised."""
        return fmean(self.divergences)


def best_of(history: Sequence[Evaluation]) -> Evaluation:
    """The evaluation of the smallest mean, the first of equals."""
    return min(history, key=lambda evaluation: evaluation.mean)


def climb(
    space: Space,
    objective: Callable[[Schedule, Action], tuple[float, ...]],
    *,
    evaluations: int,
    seed: int,
    history: Sequence[Evaluation] = (),
    done: Callable[[Sequence[Evaluation]], None],
) -> list[Evaluation]:
    """Ask ``objective`` for the starting points, then proposals near the best, until there are so many ``evaluations``.

    What comes next depends on ``seed`` and on what was evaluated, and on nothing else: with a ``history`` it goes on as
    if it had never stopped. ``done`` is told after each evaluation. Ends early once all near the best ones are known.
    """
    found = list(history)
    starts = space.starts()
    while len(found) < max(evaluations, len(starts)):
        if len(found) < len(starts):
            proposal: Proposal | None = starts[len(found)]
        else:
            parents = sorted(found, key=lambda evaluation: evaluation.mean)[:PARENTS]
            known = {space.key(evaluation.proposal) for evaluation in found}
            proposal = space.near([p.proposal for p in parents], known, Random(f"{seed} {len(found)}"))
        if proposal is None:
            break
        found.append(Evaluation(proposal, objective(proposal.schedule, space.action)))
        done(found)
    return found
