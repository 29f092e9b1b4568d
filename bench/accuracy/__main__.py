"""Ask every method, routed and removed, the questions of ``reroute demo``: ``python -m bench.accuracy``.

Answers are kept in ``--runs``, a file for each cell: interrupted at any moment, the same command goes on. Questions
come in rounds, so the page can be written from what there is at any time (``--only-page``).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from reroute.cli.common import positive
from reroute.demo.tinyvlm import CHECKPOINTS
from reroute.demo.tinyvlm.conditions import CONDITIONS
from reroute.files import write_text
from reroute.methods import METHODS
from reroute.report import Results, Setup

from .cells import Checkpoint, Grid, grid
from .figures import COSTS, draw
from .page import page
from .run import Runs, run
from .summary import results_of


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__)
    add = parser.add_argument
    add("--n", type=positive, default=500, help="questions of each of six families (default: %(default)s)")
    add("--models", nargs="+", default=list(CHECKPOINTS), metavar="MODEL", help="of the package by name, or folders")
    add("--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS), help="default: all")
    add("--methods", nargs="+", choices=[*METHODS, "calibrated"], help="default: all of the registry, and calibrated")
    add("--split", choices=("train", "validation", "test"), default="test", help="default: %(default)s")
    add("--seed", type=int, default=777, help="of the questions (default: %(default)s)")
    add("--runs", type=Path, default=Path("runs/accuracy"), metavar="FOLDER", help="default: %(default)s")
    add("--docs", type=Path, default=Path("docs"), metavar="FOLDER", help="for the page (default: %(default)s)")
    add("--only-page", action="store_true", help="ask nothing, and write the page from what was answered")
    add("--threads", type=positive, default=os.cpu_count() or 1, help="default: %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    models = {}
    for name in options.models:
        checkpoint = Checkpoint.load(name)
        cells = grid(checkpoint, options.conditions, options.methods)
        n = 0 if options.only_page else options.n
        print(f"{checkpoint.name}: {len(cells.cells)} cells, {6 * n * len(cells.cells)} answers", flush=True)
        runs = run(checkpoint, cells.cells, options.runs, n=n, split=options.split, seed=options.seed, progress=_tell)
        models[checkpoint.name] = (runs, cells)
    _write(models, options)


def _tell(line: str) -> None:
    print(line, flush=True)


def _write(models: dict[str, tuple[Runs, Grid]], options: argparse.Namespace) -> None:
    found: dict[str, tuple[dict[str, Results], tuple[tuple[Setup, str], ...]]] = {}
    figures = {}
    for name, (runs, cells) in models.items():
        results = results_of(runs, (setup for setup, _ in cells.missing))
        if not results:
            print(f"{name}: no question was answered yet")
            continue
        found[name] = (results, cells.missing)
        for cost, (label, _) in COSTS.items():
            path = options.docs / "results" / f"accuracy-{name}-{cost}.svg"
            try:
                draw(results, cost, path)
            except ImportError:
                print("No curves: they need matplotlib, pip install .[figures]")
                break
            figures[path.name] = f"{name}: accuracy against {label}"
    if not found:
        return
    target = options.docs / "results" / "accuracy.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    about = f"Questions of `{options.split}`, seed {options.seed}."
    if options.methods:
        about += f" Of the methods only {', '.join(options.methods)} in this run."
    write_text(target, page(found, about, figures))
    print(f"Page: {target.resolve()}")


if __name__ == "__main__":
    main()
