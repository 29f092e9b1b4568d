"""What ``bench.gpu_check.prefill`` measures, in which order and by when, and the file of it. Imports no torch."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, Literal

from .record import read_lines

__all__ = ["DENSE", "MODEL_NAMES", "MODES", "VARIANTS", "Deadline", "Key", "Lines", "OutOfTime", "keys"]

MODEL_NAMES = {
    "llava-7b": "LLaVA-1.5-7B",
    "qwen-7b": "Qwen2.5-VL-7B",
    "qwen-32b": "Qwen2.5-VL-32B",
    "tiny-llava": "tiny LLaVA",
    "tiny-qwen": "tiny Qwen2.5-VL",
}
"""Names on the command line and in tables. The tiny ones show on a CPU that everything runs."""

PROBLEMS = ((576, 1), (2880, 1), (16384, 1), (576, 8), (2880, 8), (16384, 8))
"""Visual tokens of a prompt and batch, the most telling first."""
TINY_PROBLEMS = ((36, 1), (64, 2))

DENSE = ("dense", "dense again")
"""The plain model, before all else of a problem and after it: a difference is drift."""
VARIANTS: dict[str, tuple[Literal["route", "remove"], float]] = {
    "route": ("route", 1 / 3),
    "remove": ("remove", 1 / 3),
    "route 1/9": ("route", 1 / 9),
}
"""Action and budget, avg_T / N."""
MODES = ("eager", "graph")
ONE_MODE = {"kernels": MODES[:1], "replay": MODES[1:]}
"""Of kinds that are measured in one alone: ``graphs=True`` replays."""
PROFILED_FROM = 2.2
"""The place in ``PROBLEMS`` behind which kernels are profiled first: once it ran, a profiler may slow launches down."""
LATER = 2.5
"""How many places behind its problem comes what tells less."""
LONG = 16384
"""Visual tokens from which the device is behind the host even eagerly: a graph then tells little more."""


@dataclass(frozen=True)
class Key:
    """What tells one line from all others. ``backend`` is empty where routing is not involved."""

    kind: str
    model: str
    visual: int
    batch: int
    variant: str
    backend: str
    mode: str


class OutOfTime(Exception):
    """What comes next would take longer than there is time."""


class Deadline:
    """An end after so many seconds from now."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def need(self, seconds: float) -> None:
        """OutOfTime unless there are so many."""
        if self.left < seconds:
            raise OutOfTime


def keys(model: str, *, cuda: bool, modes: Sequence[str] | None = None) -> list[Key]:
    """All lines of ``model``, in the order in which they are measured."""
    modes = modes or (MODES if cuda else MODES[:1])
    backends = ("triton", "torch") if cuda else ("torch",)
    problems = TINY_PROBLEMS if model.startswith("tiny-") else PROBLEMS
    ranked: list[tuple[float, Key]] = []

    def add(rank: float, kind: str, problem: tuple[int, int], variants: Sequence[tuple[str, str]]) -> None:
        for (variant, backend), mode in product(variants, ONE_MODE.get(kind, modes)):
            late = LATER if mode == "graph" and problem[0] >= LONG else 0.0
            ranked.append((rank + late, Key(kind, model, *problem, variant, backend, mode)))

    for rank, problem in enumerate(problems):
        first, *others = backends
        add(rank, "prefill", problem, [(DENSE[0], ""), ("route", first), ("remove", first)])
        add(rank, "layers", problem, [("route", "")])
        add(rank, "prefill", problem, [(DENSE[1], "")])
        if cuda:
            add(rank, "replay", problem, [(DENSE[0], ""), ("route", first), ("route 1/9", first)])
            add(max(rank, PROFILED_FROM), "kernels", problem, [("route", first)])
        extra = [("route", other) for other in others] + [("route 1/9", first)]
        add(rank + LATER, "prefill", problem, extra)
    return [key for _, key in sorted(ranked, key=lambda pair: pair[0])]


class Lines:
    """A file of JSON objects, one a line. What it has without an error need not be measured again."""

    def __init__(self, file: Path) -> None:
        """The file need not exist yet."""
        self._file = file
        names = [field.name for field in fields(Key)]
        lines = [line for line in read_lines(file) if line.keys() >= {*names}]
        # Of what was tried again, the last counts.
        self._failed = {Key(*(line[name] for name in names)): "error" in line for line in lines}
        if file.exists() and not file.read_text().endswith("\n"):
            self._write("")  # after a line that was cut off

    def wanted(self, keys: Sequence[Key]) -> list[Key]:
        """Those of ``keys`` that are to be measured; last those that failed: they may break the device once more."""
        return sorted((key for key in keys if self._failed.get(key, True)), key=self._failed.__contains__)

    def add(self, key: Key, values: dict[str, Any]) -> None:
        """Write a line at once."""
        self._write(json.dumps({**asdict(key), **values}))

    def _write(self, line: str) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:
            file.write(line + "\n")
