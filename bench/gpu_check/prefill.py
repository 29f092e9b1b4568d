"""Prefills of models of real sizes: ``python -m bench.gpu_check.prefill --model llava-7b --seconds 100 --out FILE``.

Dense, routed and with tokens removed; eager and as CUDA graphs; the decoder layers alone; the kernels of a routed
prefill. Each line of JSON is written to FILE as soon as it is measured, and not measured again by a later call with the
same file. A variant that fails becomes a line with its ``error``, and the next goes on. The exit status is 0 if
everything is measured, 3 if time ran out, and 1 if something failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .lines import MODEL_NAMES, Deadline, Key, Lines, OutOfTime, keys

if TYPE_CHECKING:
    from .measure import Session

__all__ = ["FAILED", "LEFT", "MEASURED", "main", "measure_all"]

MEASURED, FAILED, LEFT = 0, 1, 3
LONGEST = 400  # characters of an error


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check.prefill", description=__doc__)
    parser.add_argument("--model", required=True, choices=MODEL_NAMES)
    parser.add_argument("--seconds", required=True, type=float, help="for all of it")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="lines are added to it")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: only to try the tiny models")
    options = parser.parse_args(arguments)
    deadline, lines = Deadline(options.seconds), Lines(options.out)
    wanted = lines.wanted(keys(options.model, cuda=options.device == "cuda"))
    if not wanted:
        return MEASURED

    import torch  # the clock has started

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"it needs a CUDA device, and torch {torch.__version__} finds none")
    if options.device == "cpu":
        torch.set_num_threads(1)  # gets on where the machine is busy
    from .measure import Session

    try:
        session = Session(options.model, torch.device(options.device), deadline)
    except OutOfTime:
        return _out_of_time(wanted)
    return measure_all(session, wanted, lines)


def measure_all(session: Session, wanted: Sequence[Key], lines: Lines) -> int:
    """Add a line for each key until time runs out; the exit status."""
    failed = 0
    for done, key in enumerate(wanted):
        values: dict[str, Any]
        try:
            values = session.measure(key)
        except OutOfTime:
            late = _out_of_time(wanted[done:])
            return FAILED if failed else late
        except Exception as error:
            failed += 1
            traceback.print_exc()
            values = {"error": f"{type(error).__name__}: {error}"[:LONGEST]}
        lines.add(key, values)
        print(key, json.dumps(values), flush=True)
        session.clear()
    print(f"{len(wanted)} lines, {failed} of them with an error")
    return FAILED if failed else MEASURED


def _out_of_time(left: Sequence[Key]) -> int:
    print(f"out of time: {len(left)} lines left, the next of them {left[0]}")
    return LEFT


if __name__ == "__main__":
    sys.exit(main())
