"""Which ways to run a model are compared, each with the schedule whose *measured* budget is the one asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ..core.action import Action
from ..core.cost import average_tokens
from ..core.schedule import Schedule
from ..core.solver import scale_ratios
from ..errors import RerouteError
from ..methods import Diverse, Method, Random, get
from ..rankers import Deviation, Diversity, LastTokenAttention, Norm, RandomScores, Ranker
from ..report import Setup
from ..schedule_file import ScheduleFile

__all__ = [
    "ACTIONS",
    "BUDGETS",
    "TOLERANCE",
    "Depth",
    "Lineup",
    "Maker",
    "at_budget",
    "calibrated",
    "first_cuts",
    "lineup",
    "own",
    "yours",
]

BUDGETS: Final = (0.33, 0.22, 0.11, 0.049)
"""Shares avg_T / N that whole tokens of every method come near to. The last one is between 7 and 8 of 144 tokens, where
a single decision before the first layer can only have one or the other."""
TOLERANCE: Final = 0.02
"""By which a measured budget may differ from the one asked for, as a share of it."""
ACTIONS: Final[tuple[Action, ...]] = ("remove", "route")
CUT_KEEP: Final = 0.11
FIRST_CUTS: Final[dict[str, Ranker]] = {
    "chance": RandomScores(),
    "attention": LastTokenAttention(),
    "norm": Norm(),
    "deviation from the mean": Deviation(),
    "diversity": Diversity(),
}
"""What ranks the first decision before layer 0, by its name in the report."""
_STEPS: Final = 60


@dataclass(frozen=True)
class Depth:
    """The sizes on which a schedule's budget depends: decoder layers, and visual tokens N of a prompt."""

    num_layers: int
    visual: int

    def measured(self, schedule: Schedule) -> float:
        """avg_T / N, from whole tokens."""
        return average_tokens(schedule.per_layer(self.visual, self.num_layers)) / self.visual


@dataclass(frozen=True)
class Lineup:
    """All ways that are compared. ``missing``: those of the table that cannot run its budget."""

    table: tuple[Setup, ...]
    missing: tuple[Setup, ...]
    first_cuts: tuple[Setup, ...]


def lineup(depth: Depth, checkpoint: Path, extra: ScheduleFile | None = None) -> Lineup:
    """The demo's: published methods, calibrated and diverse schedules, chance, and one's own in ``extra``.

    ``checkpoint``: the folder of the model, whose ``schedules`` are the calibrated ones.
    """
    table, missing = [Setup()], []
    for keep in BUDGETS:
        for setup, make in _entries(depth, checkpoint, keep):
            try:
                table.append(at_budget(setup, make, depth))
            except RerouteError:
                missing.append(setup)
    if extra is not None:
        table += yours(extra, depth)
    return Lineup(tuple(table), tuple(missing), tuple(first_cuts(depth)))


Maker = Callable[[float], Schedule]
"""The schedule for a budget before rounding to whole tokens. RerouteError if there is none."""


def _entries(depth: Depth, checkpoint: Path, keep: float) -> Iterator[tuple[Setup, Maker]]:
    for name in ("fastv", "pdrop", "calibrated", "diverse", "divprune"):
        for action in ACTIONS:
            setup = Setup(name, action, keep)
            if name != "calibrated":
                yield setup, own(setup, depth)
            elif (make := calibrated(setup, depth, checkpoint)) is not None:
                yield setup, make
    setup = Setup("random", "remove", keep)
    yield setup, own(setup, depth)


def at_budget(setup: Setup, make: Maker, depth: Depth) -> Setup:
    """``setup`` with the schedule whose measured budget is nearest to ``setup.keep``.

    Whole tokens take up to one token a layer off what is asked for, so a little more is asked for.

    Raises:
        RerouteError: there is none within ``TOLERANCE``.
    """
    most = 2 / depth.visual
    found: list[Schedule] = []
    for step in range(_STEPS):
        with suppress(RerouteError):
            found.append(make(min(1.0, setup.keep * (1 - TOLERANCE) + most * step / _STEPS)))
    found = found or [make(setup.keep)]  # which says why not
    off: Callable[[Schedule], float] = lambda schedule: abs(depth.measured(schedule) - setup.keep)
    nearest = min(found, key=off)
    if off(nearest) > TOLERANCE * setup.keep:
        nearest = min((more for schedule in found for more in _one_more(schedule, setup.action, depth)), key=off)
    if off(nearest) > TOLERANCE * setup.keep:
        raise RerouteError(
            f"{setup.name} runs {depth.measured(nearest):.2%} of the visual tokens at best where {setup.keep:.2%} is "
            "asked for."
        )
    return replace(setup, schedule=nearest)


def _one_more(schedule: Schedule, action: Action, depth: Depth) -> Iterator[Schedule]:
    """The schedule, and those in which one stage keeps a token more."""
    yield schedule
    counts = schedule.counts(depth.visual)
    for stage, kept in enumerate(counts):
        more = min(1.0, (kept + 1.5) / depth.visual)  # rounded down, and to the nearest even one
        changed = replace(schedule, ratios=(*schedule.ratios[:stage], more, *schedule.ratios[stage + 1 :]))
        with suppress(RerouteError):
            changed.validate(depth.num_layers, action)
            if changed.counts(depth.visual)[stage] == kept + 1:
                yield changed


def own(setup: Setup, depth: Depth) -> Maker:
    """A method's own schedules. Random decides before the first layer, as nothing has to be looked at first."""
    assert setup.method is not None
    method: Method = Random(layer=0) if setup.method == Random.name else get(setup.method)

    def make(keep: float) -> Schedule:
        schedule = method.with_budget(keep, depth.num_layers, setup.action).schedule(depth.num_layers, setup.action)
        schedule.validate(depth.num_layers, setup.action)
        return schedule

    return make


def calibrated(setup: Setup, depth: Depth, checkpoint: Path) -> Maker | None:
    """The schedule that ``reroute calibrate`` found for a budget a little above; None if there is no file of it."""
    path = checkpoint / "schedules" / f"{setup.action}-{100 * setup.keep:.0f}.json"
    if not path.is_file():
        return None
    return _scaled(ScheduleFile.read(path).for_model(depth.num_layers), depth)


def _scaled(schedule: Schedule, depth: Depth) -> Maker:
    """Its ratios times one factor."""
    return lambda keep: replace(schedule, ratios=scale_ratios(schedule.ratios, schedule.layers, depth.num_layers, keep))


def yours(file: ScheduleFile, depth: Depth) -> Iterable[Setup]:
    """The schedule in a file at its own budget, under each action that it allows."""
    schedule = file.for_model(depth.num_layers)
    for action in ACTIONS:
        try:
            schedule.validate(depth.num_layers, action)
        except RerouteError:
            continue
        yield Setup(file.path.stem, action, depth.measured(schedule), schedule)


def first_cuts(depth: Depth) -> Iterator[Setup]:
    """The schedule of Diverse with other first decisions, under both actions."""
    setup = at_budget(Setup(Diverse.name, "route", CUT_KEEP), own(Setup(Diverse.name, "route"), depth), depth)
    assert setup.schedule is not None
    for name, ranker in FIRST_CUTS.items():
        schedule = replace(setup.schedule, rankers=(ranker, *setup.schedule.rankers[1:]))
        for action in ACTIONS:
            yield Setup(name, action, CUT_KEEP, schedule)
