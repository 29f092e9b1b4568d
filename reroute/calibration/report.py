"""What a calibration has found, and how it compares with the published schedules on prompts that chose nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, variance

from ..core.cost import ModelShape, estimate_cost
from ..core.schedule import Action, Schedule
from ..errors import RerouteError
from .objective import Objective
from .prompts import Prompt
from .proposal import Proposal

__all__ = ["Calibration", "Comparison", "compare", "doubts"]


@dataclass(frozen=True)
class Comparison:
    """A schedule under an action on the prompts that were held out.

    - ``divergences``: of each prompt, in nats: KL of the plain model's answers, see ``reroute.calibrate``.
    - ``avg_tokens``: avg_T, counted; ``flops``: of the prefill with scoring, as a share of the plain one. Means.
    """

    name: str
    action: Action
    schedule: Schedule
    divergences: tuple[float, ...]
    avg_tokens: float
    flops: float

    @property
    def mean(self) -> float:
        """Of the divergences."""
        return fmean(self.divergences)

    @property
    def error(self) -> float:
        """Standard error of the mean over prompts."""
        return _error(self.divergences)

    def minus(self, other: Comparison) -> tuple[float, float]:
        """How much larger the mean is than that of ``other``, and the standard error of the paired difference."""
        gaps = [a - b for a, b in zip(self.divergences, other.divergences, strict=True)]
        return fmean(gaps), _error(gaps)


@dataclass(frozen=True)
class Calibration:
    """The schedule that ``reroute.calibrate`` found; printed, the whole report.

    - ``schedule``, ``keep``, ``action``, ``num_layers``: what was found, for which budget and depth.
    - ``evaluations``: schedules that were tried; ``chosen_on``: prompts that chose among them.
    - ``mean_chosen``: divergence on these, which flatters: the smallest of many was taken.
    - ``comparisons``: the schedule that was found first, then the published ones, on all other prompts.
    - ``warnings``: why not to trust it; ``notes``: what could not be compared.
    """

    schedule: Schedule
    keep: float
    action: Action
    num_layers: int
    evaluations: int
    chosen_on: int
    mean_chosen: float
    comparisons: tuple[Comparison, ...]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Comparison:
        """The schedule that was found, under the action that it was found for."""
        return self.comparisons[0]

    def __str__(self) -> str:
        """A table and what is to be said of it."""
        held = len(self.best.divergences)
        lines = [
            f"keep {self.keep:.4g} on {self.num_layers} layers, action {self.action}: nearest to the plain model on "
            f"{self.chosen_on} prompts,",
            f"of {self.evaluations} schedules, is (before layer: ratio)",
            f"  {Proposal.of(self.schedule)}",
            f"KL from the plain model on {held} other prompts, in nats, ± standard error:",
            f"  {'':20}{'KL':>16}{'minus calibrated':>20}{'avg_T':>8}{'FLOPs':>8}",
        ]
        for row in self.comparisons:
            gap = "" if row is self.best else "{:+.3f} ± {:.3f}".format(*row.minus(self.best))
            kl = f"{row.mean:.3f} ± {row.error:.3f}"
            name = f"{row.name} {row.action}"
            lines.append(f"  {name:20}{kl:>16}{gap:>20}{row.avg_tokens:>8.1f}{row.flops:>8.1%}")
        lines.append(f"On the prompts that chose it, the KL of the calibrated schedule is {self.mean_chosen:.3f}.")
        return "\n".join([*lines, *self.notes, *(f"Warning: {warning}" for warning in self.warnings)])


def compare(
    objective: Objective,
    shape: ModelShape,
    prompts: Sequence[Prompt],
    schedules: Mapping[str, Schedule],
    action: Action,
) -> tuple[list[Comparison], list[str]]:
    """Each of ``schedules`` under ``action``, then each under the other one where that can be, and notes where not."""
    found, notes = [], []
    other: Action = "remove" if action == "route" else "route"
    for each in (action, other):
        for name, schedule in schedules.items():
            try:
                schedule.validate(shape.num_layers, each)
            except RerouteError:
                notes.append(f"{name} {each}: not possible, as its ratios grow and a removed token cannot return.")
                continue
            found.append(_comparison(name, each, schedule, objective(schedule, each), shape, prompts))
    return found, notes


def doubts(comparisons: Sequence[Comparison]) -> list[str]:
    """Whether the first of ``comparisons`` is no better than the others under the same action."""
    best, *others = comparisons
    rivals = [row for row in others if row.action == best.action]
    if not rivals:
        return []
    rival = min(rivals, key=lambda row: row.mean)
    gap, error = rival.minus(best)
    if gap > 2 * error:
        return []
    return [
        f"On the prompts held out the calibrated schedule is not clearly better than that of {rival.name} "
        f"({gap:+.3f} ± {error:.3f}): chance may explain the difference. More prompts may tell."
    ]


def _comparison(
    name: str,
    action: Action,
    schedule: Schedule,
    divergences: tuple[float, ...],
    shape: ModelShape,
    prompts: Sequence[Prompt],
) -> Comparison:
    plain = Schedule((0,), (1.0,))
    costs = [estimate_cost(shape, schedule, action, p.visual, len(p) - p.visual) for p in prompts]
    dense = [estimate_cost(shape, plain, action, p.visual, len(p) - p.visual).prefill_flops for p in prompts]
    flops = sum(cost.prefill_flops for cost in costs) / sum(dense)
    return Comparison(name, action, schedule, divergences, fmean(cost.avg_tokens for cost in costs), flops)


def _error(values: Sequence[float]) -> float:
    return sqrt(variance(values) / len(values)) if len(values) > 1 else float("inf")
