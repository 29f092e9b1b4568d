"""``python tests/mutants [--only NAME ...] [--list]``: plants each fault in a copy of the project and runs its tests.

Prints what killed each mutant. Exits with 1 if one survives that should not, or dies that was said to change nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[2]))

from mutants import MUTANTS
from runner import Tree, judge

from reroute_kernels.testing.find_simt import MISSING, simt_path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/mutants", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="mutants whose names contain one of these")
    parser.add_argument("--list", action="store_true", help="their names, files and tests; runs nothing")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.only or any(part in m.name for part in options.only)]
    if not chosen:
        parser.error(f"no mutant is named like {' or '.join(options.only)}; --list shows all")
    if options.list:
        for mutant in chosen:
            print(f"{mutant.name:36} {mutant.file:18} {', '.join(mutant.executors):20} {mutant.tests}")
        return
    if simt_path() is None:
        print(f"no fault was planted: {MISSING}")
        return
    with TemporaryDirectory(prefix="mutants-") as folder:
        wrong = judge(Tree(Path(folder)), chosen, lambda line: print(line, flush=True))
    if wrong:
        sys.exit("\n".join(["", "Not as the list says:", *wrong]))


if __name__ == "__main__":
    main()
