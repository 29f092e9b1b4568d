"""Answers in files, one of JSON lines for each cell: what was answered is never asked again."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import reroute
import reroute_kernels
from reroute.demo.tinyvlm.evaluation import Outcome
from reroute.rankers import Ranker
from reroute.report import Cost, Setup

from .cells import Cell, Checkpoint

__all__ = ["Answered", "Record", "key_of"]

VERSION: Final = 1
"""Of what ``Record`` writes."""
_CODE: Final = ("core", "demo/tinyvlm", "transformers", "config.py", "handle.py", "stats.py")
_RANKERS: Final = ("base.py", "scores.py", "vision.py")


@dataclass(frozen=True)
class Answered:
    """One question, by its kind and its number in it, the answer, and what it is worth."""

    kind: str
    number: int
    answer: str
    outcome: Outcome

    @property
    def question(self) -> tuple[str, int]:
        """What tells it from other questions of the condition."""
        return self.kind, self.number


@dataclass
class Record:
    """A cell's file: a head that says what it is, and a line for each answer.

    ``cost`` is None until it was measured.
    """

    path: Path
    head: dict[str, Any]
    cost: Cost | None
    answers: dict[tuple[str, int], Answered]

    @classmethod
    def open(cls, folder: Path, head: dict[str, Any]) -> Record:
        """The record of the cell that ``head`` describes, with what is there already.

        A line that was cut off by an interruption is dropped, and so is all that follows it.
        """
        path = folder / f"{_digest(json.dumps(head, sort_keys=True))}.jsonl"
        record = cls(path, head, None, {})
        if path.is_file():
            record._read()
        return record

    def _read(self) -> None:
        text = self.path.read_bytes()
        end = 0
        for line in text.splitlines(keepends=True):
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if entry is None:
                break
            end += len(line)
            if "cost" in entry:
                self.cost = Cost(**entry["cost"])
            elif "answer" in entry:
                answered = Answered(
                    entry["kind"], entry["number"], entry["answer"], Outcome(entry["correct"], entry["iou"])
                )
                self.answers[answered.question] = answered
        if end < len(text):
            with self.path.open("r+b") as file:
                file.truncate(end)

    def measured(self, cost: Cost) -> None:
        """Write what it costs."""
        self.cost = cost
        self._append([{"cost": asdict(cost)}])

    def add(self, answers: Iterable[Answered]) -> None:
        """Write answers."""
        answers = list(answers)
        self._append({"kind": a.kind, "number": a.number, "answer": a.answer, **asdict(a.outcome)} for a in answers)
        self.answers.update((answered.question, answered) for answered in answers)

    def _append(self, entries: Iterable[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        with self.path.open("a", encoding="utf-8") as file:
            for entry in (*([{"version": VERSION, **self.head}] if is_new else []), *entries):
                file.write(json.dumps(entry) + "\n")


def key_of(checkpoint: Checkpoint, cell: Cell, split: str, seed: int) -> dict[str, Any]:
    """What the answers of a cell depend on: how it is run, weights, questions, and the code that runs it."""
    return {
        "model": checkpoint.name,
        "weights": _digest_of(checkpoint.folder / "model.safetensors"),
        "condition": cell.condition,
        "split": split,
        "seed": seed,
        "config": cell.setup.config("torch").to_json(),
        "code": code_version(cell.setup),
    }


def code_version(setup: Setup) -> str:
    """A digest of the sources that a run of ``setup`` goes through: other rankers, methods and commands may change."""
    house = Path(inspect.getfile(reroute)).parent
    files = [path for part in _CODE for path in _sources(house / part)]
    files += [house / "rankers" / name for name in _RANKERS]
    files += Path(inspect.getfile(reroute_kernels)).parent.glob("*.py")
    if setup.schedule is not None:
        files += [path for ranker in setup.schedule.rankers for path in _classes(type(ranker))]
    return _digest("".join(sorted({_digest_of(path) for path in files})))


def _classes(ranker: type[Ranker]) -> Iterator[Path]:
    """The sources of a ranker and of what it inherits from, outside of Python's own library."""
    packages = {"reroute", ranker.__module__.partition(".")[0]}
    return (Path(inspect.getfile(kind)) for kind in ranker.__mro__ if kind.__module__.partition(".")[0] in packages)


def _sources(place: Path) -> list[Path]:
    return [place] if place.is_file() else sorted(place.rglob("*.py"))


@cache
def _digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
