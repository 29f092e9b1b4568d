"""Everything that needs a GPU, in minutes: ``python -m bench.gpu_check [--minutes M] [--only STEP …] [--out FOLDER]``.

Do the kernels start, are they right, how long does a routed prefill take beside a dense one, then single operations,
sanitizers and counters. Each program has a limited time, and neither an error nor a hang reaches another. Results are
on disk after every step; a later call with the same folder goes on with what has not passed. It needs torch, triton,
transformers, pytest and hypothesis, and the tools of the CUDA toolkit where they are.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from .day import NOTHING_RUN, Day
from .plan import MINUTES, STEPS, chosen
from .record import Record

STATUSES = """exit status: 0 all passed (or cannot run on this machine); 1 something failed; 2 nothing was run (no GPU,
or wrong arguments); 3 nothing failed, but time ran out: the same command goes on; 4 the kernels do not start"""


def main() -> int:
    """The exit status."""
    steps = "\n".join(f"  {s.name:22} about {s.estimate:3.0f} s, at most {s.limit:3.0f}" for s in STEPS)
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check",
        description=__doc__,
        epilog=f"steps:\n{steps}\n\n{STATUSES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, metavar="M", help=f"in all, by default {MINUTES:.0f}")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="STEP", help="these steps or groups (what is before /)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), metavar="FOLDER", help="for all results")
    options = parser.parse_args()
    try:
        wanted, record = chosen(options.only), Record(options.out.absolute())
    except ValueError as error:
        parser.error(str(error))
    day = Day(record, options.minutes)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda *_: day.stop())
    status = day.go_through(wanted)
    if status != NOTHING_RUN:
        print(f"\n{record.table()}\n\nWritten to {record.folder}.")
    return status


if __name__ == "__main__":
    sys.exit(main())
