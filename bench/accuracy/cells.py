"""What is measured: a cell is one way to run one model under one condition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reroute.cli.measure import routed
from reroute.cli.setups import ACTIONS, BUDGETS, Depth, Maker, at_budget, calibrated, first_cuts, own
from reroute.demo import tinyvlm
from reroute.demo.tinyvlm.conditions import CONDITIONS
from reroute.demo.tinyvlm.evaluation import prompts
from reroute.demo.tinyvlm.examples import examples
from reroute.errors import RerouteError
from reroute.methods import METHODS
from reroute.report import Setup
from reroute.transformers import adapter_of

__all__ = ["Cell", "Checkpoint", "Grid", "grid"]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model that answers the questions of ``reroute.demo``. ``folder``: its weights, and perhaps its schedules."""

    name: str
    folder: Path
    model: Any
    processor: Any

    @classmethod
    def load(cls, name: str) -> Checkpoint:
        """A checkpoint that ships with the package, by its name there, or the one in a folder."""
        folder = tinyvlm.CHECKPOINTS.get(name, Path(name))
        return cls(folder.name, folder, *tinyvlm.load(folder))

    def check(self, setup: Setup) -> None:
        """Run a prompt. RerouteError if this model cannot be run in that way, as it lacks what a ranker looks at."""
        inputs = prompts(self.model, self.processor, examples("validation", {"attr": 1}))
        with torch.no_grad(), routed(self.model, setup, "torch"):
            self.model(**inputs, logits_to_keep=1)

    @property
    def depth(self) -> Depth:
        """Its layers, and the visual tokens of a picture."""
        grid = self.model.config.vision_config
        return Depth(len(adapter_of(self.model).layers), (grid.image_size // grid.patch_size) ** 2)


@dataclass(frozen=True)
class Cell:
    """``kind``: ``table``, or ``first cut`` for those that differ in their first decision alone."""

    condition: str
    setup: Setup
    kind: str = "table"


@dataclass(frozen=True)
class Grid:
    """The cells of one checkpoint. ``missing``: setups that cannot be, each with the reason."""

    cells: tuple[Cell, ...]
    missing: tuple[tuple[Setup, str], ...]


def grid(
    checkpoint: Checkpoint, conditions: Sequence[str] = tuple(CONDITIONS), methods: Sequence[str] | None = None
) -> Grid:
    """All methods of the registry, calibrated schedules if there are files of them, and other first cuts.

    Args:
        checkpoint: the model.
        conditions: names of ``CONDITIONS``.
        methods: names, if not all.
    """
    setups, missing = [Setup()], []
    for setup, make in _asked(checkpoint, [*METHODS, "calibrated"] if methods is None else methods):
        try:
            found = at_budget(setup, make, checkpoint.depth)
            checkpoint.check(found)
            setups.append(found)
        except RerouteError as error:
            missing.append((setup, str(error)))
    cuts = list(first_cuts(checkpoint.depth))
    cells = [
        cell
        for condition in conditions
        for cell in (
            *(Cell(condition, setup) for setup in setups),
            *(Cell(condition, setup, "first cut") for setup in cuts),
        )
    ]
    return Grid(tuple(cells), tuple(missing))


def _asked(checkpoint: Checkpoint, methods: Sequence[str]) -> Iterator[tuple[Setup, Maker]]:
    for keep in BUDGETS:
        for name in methods:
            for action in ACTIONS:
                setup = Setup(name, action, keep)
                if name != "calibrated":
                    yield setup, own(setup, checkpoint.depth)
                elif (make := calibrated(setup, checkpoint.depth, checkpoint.folder)) is not None:
                    yield setup, make
