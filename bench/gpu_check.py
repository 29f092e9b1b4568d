"""Everything that needs a GPU, in one command: ``python -m bench.gpu_check [--out FOLDER]``, or ``make gpu-check``.

Kernel tests, a routed prefill as a CUDA graph and one that may not wait, the micro-benchmarks, and sanitizers. A step
that fails or hangs does not stop the others. Results are written as CSV and JSON after every step, with all that the
steps print beside them. Prints one table at the end, and exits with 0 only if all passed.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import gpu_steps as steps
from .cases import OPERATIONS
from .gpu_steps import Measurement, Program, Run, StepFailed, StepSkipped

__all__ = ["Result", "attempt", "main", "plan", "report", "save"]

Step = Callable[[], "str | list[Measurement]"]
EXPECTED = "floor and modelled"  # columns of the table, whatever GPU it is


@dataclass(frozen=True)
class Result:
    """Of one step. status: passed, failed or skipped."""

    step: str
    status: str
    seconds: float
    detail: str
    measurements: tuple[Measurement, ...] = ()


def plan(folder: Path) -> dict[str, Step]:
    """The steps, those that tell most for their time first. The output of each goes to a file of ``folder``."""
    every: dict[str, Callable[[Run], str | list[Measurement]]] = {
        **{f"kernel tests: {name}": partial(steps.kernel_tests, name) for name in steps.KERNEL_TESTS},
        "CUDA graph": partial(steps.prefills, "graph"),
        "no waiting": partial(steps.prefills, "no-waiting"),
        **{f"benchmarks: {operation}": partial(steps.benchmarks, operation) for operation in OPERATIONS},
        "memcheck": partial(steps.sanitizer, "memcheck"),
        "racecheck": partial(steps.sanitizer, "racecheck"),
    }
    log = lambda name: folder / f"{re.sub(r'[: ]+', '-', name)}.txt"
    return {name: partial(step, Program(log(name))) for name, step in every.items()}


def attempt(name: str, step: Step) -> Result:
    """Run ``step``, whatever happens."""
    start = time.perf_counter()
    status = "passed"
    measurements: tuple[Measurement, ...] = ()
    try:
        found = step()
        if isinstance(found, str):
            detail = found
        else:
            detail, measurements = f"{len(found)} measurements", tuple(found)
    except StepSkipped as reason:
        status, detail = "skipped", str(reason)
    except StepFailed as error:
        status, detail, measurements = "failed", str(error), error.measurements
    except Exception:
        status, detail = "failed", traceback.format_exc()
    return Result(name, status, round(time.perf_counter() - start, 1), detail, measurements)


def save(results: Sequence[Result], environment: dict[str, Any], folder: Path) -> None:
    """Write results.json and results.csv to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"environment": environment, "steps": [asdict(result) for result in results]}
    (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    with (folder / "results.csv").open("w", newline="") as file:
        csv.writer(file).writerows(_table(results))


def report(results: Sequence[Result], environment: dict[str, Any]) -> str:
    """What each step found, and the table."""
    table = _table(results)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in table]
    details = [f"--- {result.step} {result.status}: {result.detail}" for result in results]
    units = f"Microseconds on {environment['gpu']}; floor and modelled are {environment[EXPECTED]}."
    return "\n".join([*details, "", units, "", *lines])


def _table(results: Sequence[Result]) -> list[list[str]]:
    names = [field.name for field in fields(Measurement)]
    table = [["step", "status", "seconds", *names]]
    for result in results:
        table.append([result.step, result.status, str(result.seconds), *[""] * len(names)])
        for measurement in result.measurements:
            table.append([result.step, "measured", "", *map(_cell, asdict(measurement).values())])
    return table


def _cell(value: str | float | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.2f}"


def _environment(device: torch.device) -> dict[str, Any]:
    import transformers
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__}
    gpu, cuda = torch.cuda.get_device_name(device), torch.version.cuda
    return {"gpu": gpu, "cuda": cuda, **versions, "python": platform.python_version(), EXPECTED: "of an H100 SXM"}


def main() -> int:
    """The exit status: 0 if every step passed or had nothing to run with, 1 if one failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), metavar="FOLDER", help="for CSV and JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"gpu-check needs a CUDA device, and torch {torch.__version__} finds none.", file=sys.stderr)
        return 2
    environment = _environment(torch.device("cuda"))
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    results: list[Result] = []
    for name, step in plan(options.out).items():
        results.append(attempt(name, step))
        save(results, environment, options.out)
        print(f"{results[-1].status:8s}{name} ({results[-1].seconds} s)", flush=True)
    print(report(results, environment))
    print(f"\nWritten to {options.out}: results.csv, results.json, and what each step printed.")
    return int(any(result.status == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
