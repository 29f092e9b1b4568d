"""The files of a results folder, valid at any moment: results.json, measured.jsonl, log.txt, table.txt, ncu.txt."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["Record", "Result", "Status", "read_lines"]

Status = Literal["passed", "failed", "skipped", "unfinished"]


@dataclass(frozen=True)
class Result:
    """Of one step. seconds: what it took; estimate: on an H100. detail: a line. end: of the output, if it failed.
    source: a digest of the code that it ran on.
    """

    step: str
    status: Status
    seconds: float
    estimate: float
    detail: str
    end: str = ""
    source: str = ""


class Record:
    """What is known of the steps, in memory and in a folder, which may hold what an earlier call found."""

    def __init__(self, folder: Path) -> None:
        """ValueError if the folder holds results that are not of this program."""
        self.folder = folder
        self.measured = folder / "measured.jsonl"
        self.environment: dict[str, Any] = {}
        self.results: dict[str, Result] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if (file := folder / "results.json").exists():
            try:
                known = json.loads(file.read_text())
                self.environment = known["environment"]
                self.results = {fields["step"]: Result(**fields) for fields in known["steps"]}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file} is not of this program ({error!r}); choose another folder") from error
        _drop_half_a_line(self.measured)

    def passed(self, step: str) -> bool:
        """Whether ``step`` need not run again."""
        return step in self.results and self.results[step].status == "passed"

    def add(self, *results: Result) -> None:
        """Replace what was known of their steps, and write it down."""
        self.results |= {result.step: result for result in results}
        self.write()

    def write(self) -> None:
        """results.json and table.txt."""
        _drop_half_a_line(self.measured)
        record = {"environment": self.environment, "steps": [asdict(result) for result in self.results.values()]}
        _replace(self.folder / "results.json", json.dumps(record, indent=1) + "\n")
        _replace(self.folder / "table.txt", self.table() + "\n")

    def log(self, heading: str, output: str) -> None:
        """Add what a program printed to the log."""
        with (self.folder / "log.txt").open("a") as file:
            file.write(f"\n{'=' * 20} {heading} {'=' * 20}\n{output.rstrip()}\n")

    def keep(self, name: str, output: str) -> None:
        """A file of its own for what a program printed."""
        _replace(self.folder / name, output)

    def table(self) -> str:
        """Everything to look at, the steps last: of a long output the end is what is seen."""
        about = [f"{name}: {value}" for name, value in self.environment.items()]
        rows = [[r.step, r.status, f"{r.seconds:.0f}", f"{r.estimate:.0f}", r.detail] for r in self.results.values()]
        ends = [f"--- {r.step} {r.status}\n{r.end}" for r in self.results.values() if r.end]
        steps = _aligned([["step", "status", "seconds", "estimate", "detail"], *rows])
        return "\n\n".join([*_tables(read_lines(self.measured)), *ends, "\n".join(about), steps])


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of one a line, which need not exist."""
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            fields = json.loads(line)
        except json.JSONDecodeError:  # its program was killed meanwhile
            continue
        if isinstance(fields, dict):
            yield fields


def _tables(lines: Iterable[dict[str, Any]]) -> Iterator[str]:
    """One for each kind of measurement: a column for each key that has no more than one value in it."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        kinds.setdefault(str(line.get("kind")), []).append(line)
    for kind, of_kind in kinds.items():
        columns = {key: None for line in of_kind for key in line if key != "kind"}
        shown = [key for key in columns if not any(isinstance(line.get(key), (dict, list)) for line in of_kind)]
        yield f"{kind}\n" + _aligned([shown, *([_cell(line.get(key)) for key in shown] for line in of_kind)])


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value).replace("\n", " ")[:100]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _replace(file: Path, text: str) -> None:
    """Write all of ``text`` or nothing."""
    part = file.with_name(f".{file.name}.part")
    part.write_text(text)
    os.replace(part, file)


def _drop_half_a_line(file: Path) -> None:
    """What a program that was killed in the midst of it left at the end."""
    if not file.exists():
        return
    with file.open("rb+") as lines:
        lines.truncate(lines.read().rfind(b"\n") + 1)
