"""Micro-benchmarks of the routing operations: ``python -m bench.gpu_check.operations --seconds S --out FILE``.

Adds a line of JSON to the file for each measurement at once, and skips what the file has without an error. The exit
status is 0 if everything is measured, 3 if time ran out, and 1 if something cannot be measured.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

__all__ = ["main"]


def main() -> int:
    """The exit status."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check.operations", description=__doc__)
    parser.add_argument("--seconds", type=float, required=True, metavar="S", help="in all, imports included")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="lines of JSON")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="without CUDA there are no graphs")
    options = parser.parse_args()
    from .micro import measure  # imports torch, whose seconds count

    return measure(options.device, options.out, begin + options.seconds)


if __name__ == "__main__":
    sys.exit(main())
