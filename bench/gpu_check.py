"""Everything that needs a GPU, in one command: ``python -m bench.gpu_check [--out FOLDER]``, or ``make gpu-check``.

Kernel tests, sanitizers, a routed prefill as a CUDA graph and one that may not wait, and the micro-benchmarks. A step
that fails does not stop the others. Prints one table, writes it as CSV and JSON, and exits with 0 only if all passed.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from . import gpu_steps as steps
from .gpu_steps import Measurement, StepFailed, StepSkipped

__all__ = ["Result", "attempt", "main", "plan", "report"]

Step = Callable[[], "str | list[Measurement]"]


@dataclass(frozen=True)
class Result:
    """Of one step. status: passed, failed or skipped."""

    step: str
    status: str
    seconds: float
    detail: str
    measurements: tuple[Measurement, ...] = ()


def plan(device: torch.device) -> dict[str, Step]:
    """The steps in order."""
    return {
        "kernel tests": steps.kernel_tests,
        "memcheck": lambda: steps.sanitizer("memcheck"),
        "racecheck": lambda: steps.sanitizer("racecheck"),
        "CUDA graph": lambda: steps.graph(device),
        "no waiting": lambda: steps.no_waiting(device),
        "benchmarks": steps.benchmarks,
    }


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


def report(results: Sequence[Result], environment: dict[str, Any], folder: Path) -> str:
    """Write results.json and results.csv to ``folder``; return the table, below what went wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"environment": environment, "steps": [asdict(result) for result in results]}
    (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    names = [field.name for field in fields(Measurement)]
    table: list[list[str]] = [["step", "status", "seconds", *names]]
    for result in results:
        table.append([result.step, result.status, str(result.seconds), *[""] * len(names)])
        for measurement in result.measurements:
            table.append([result.step, "measured", "", *map(_cell, asdict(measurement).values())])
    with (folder / "results.csv").open("w", newline="") as file:
        csv.writer(file).writerows(table)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in table]
    details = [f"--- {r.step} {r.status}: {r.detail}" for r in results if r.status != "passed"]
    return "\n".join([*details, "", *lines])


def _cell(value: str | float | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.2f}"


def _environment(device: torch.device) -> dict[str, Any]:
    import transformers
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__}
    gpu, cuda = torch.cuda.get_device_name(device), torch.version.cuda
    return {"gpu": gpu, "cuda": cuda, **versions, "python": platform.python_version()}


def main() -> int:
    """The exit status: 0 if every step passed or had nothing to run with, 1 if one failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), metavar="FOLDER", help="for CSV and JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"gpu-check needs a CUDA device, and torch {torch.__version__} finds none.", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    environment = _environment(device)
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    results = []
    for name, step in plan(device).items():
        results.append(attempt(name, step))
        print(f"{results[-1].status:8s}{name} ({results[-1].seconds} s)", flush=True)
    print(report(results, environment, options.out))
    print(f"\nMicroseconds. Written to {options.out}/results.csv and results.json.")
    return int(any(result.status == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
