"""Schedules in files: what ``reroute calibrate`` writes, and whatever ``Schedule.to_json`` wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any, TypeGuard

from .core.schedule import Schedule
from .core.solver import budget_of, check_keep
from .errors import RerouteError
from .files import write_text

__all__ = ["ScheduleFile", "is_file"]

VERSION = 1
"""Of what ``write`` writes."""


def is_file(schedule: object) -> TypeGuard[str | os.PathLike[str]]:
    """Whether this names a file. A text that is JSON itself does not."""
    return isinstance(schedule, os.PathLike) or (isinstance(schedule, str) and not schedule.lstrip().startswith("{"))


@dataclass(frozen=True)
class ScheduleFile:
    """A schedule and the depth of the model that it is for, None if the file does not say. ``path``: the file."""

    path: Path
    schedule: Schedule
    num_layers: int | None = None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ScheduleFile:
        """Read ``path``.

        Raises:
            RerouteError: there is no such file, or no schedule in it.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            found = json.loads(text)
        except OSError as error:
            raise RerouteError(f"The schedule {path} cannot be read: {error.strerror}.") from None
        except (ValueError, RecursionError) as error:
            raise _unreadable(path, str(error)) from None
        if not isinstance(found, dict):
            raise _unreadable(path, "it is not a JSON object")
        if "schedule" not in found:
            return cls(path, Schedule.from_json(text))
        if found.get("version") != VERSION:
            raise RerouteError(
                f"{path} holds a schedule of version {found.get('version')}; this release knows version {VERSION}."
            )
        if not isinstance(found.get("num_layers"), int):
            raise _unreadable(path, "num_layers is missing")
        return cls(path, Schedule.from_json(json.dumps(found["schedule"])), found["num_layers"])

    def write(self, about: Mapping[str, Any]) -> None:
        """Write the file, as a whole or not at all, with what is to be known ``about`` the schedule besides."""
        layers = self.num_layers
        keep = {} if layers is None else {"num_layers": layers, "keep": self.keep_on(layers)}
        found = {"version": VERSION, "schedule": json.loads(self.schedule.to_json()), **keep, **about}
        write_text(self.path, json.dumps(found, indent=1) + "\n")

    def keep_on(self, num_layers: int) -> float:
        """The budget avg_T / N on ``num_layers`` layers, before rounding to counts."""
        return budget_of(self.schedule.layers, self.schedule.ratios, num_layers)

    def for_model(self, num_layers: int, keep: float | None = None) -> Schedule:
        """The schedule for a model of ``num_layers`` layers.

        Raises:
            RerouteError: it is for a model of another depth, or its budget is not the ``keep`` that is given.
        """
        if self.num_layers is not None and self.num_layers != num_layers:
            raise RerouteError(
                f"The schedule {self.path} is for {self.num_layers} layers, and the model has {num_layers}. Calibrate "
                "this model: reroute calibrate."
            )
        self.schedule.validate(num_layers, "route")
        own = self.keep_on(num_layers)
        if keep is not None and not isclose(check_keep(keep), own, rel_tol=1e-3):
            raise RerouteError(
                f"The schedule {self.path} has the budget keep={own:.4g}, not {keep:g}. Leave keep out, or calibrate "
                "for the one that you want."
            )
        return self.schedule


def _unreadable(path: Path, why: str) -> RerouteError:
    return RerouteError(f"{path} holds no schedule ({why}). Pass what reroute calibrate or Schedule.to_json wrote.")
