"""Measures a model that ships with the package: accuracy, baselines and the depth probe, as Markdown tables.

python -m reroute.demo.tinyvlm --split validation
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from . import CHECKPOINTS, load, probes
from .evaluation import answers, score, summarise, summarise_kinds
from .examples import COUNTS, examples


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m reroute.demo.tinyvlm", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--split", choices=("train", "validation", "test"), default="validation")
    parser.add_argument("--kinds", help="comma-separated kinds instead of the default ones")
    parser.add_argument("--count", type=int, help="examples of every kind (default: see COUNTS)")
    parser.add_argument("--seed", type=int, default=777)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", choices=CHECKPOINTS, default="labels", help="default: %(default)s")
    which.add_argument("--checkpoint", type=Path, help="another checkpoint folder")
    parser.add_argument("--no-probe", action="store_true", help="leave the depth probe out")
    options = parser.parse_args(arguments)
    kinds = options.kinds.split(",") if options.kinds else list(COUNTS)
    counts = {kind: options.count or COUNTS.get(kind, 100) for kind in kinds}
    try:
        chosen = examples(options.split, counts, options.seed)
        model, processor = load(options.checkpoint or options.model)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"{error}\n")
    texts = answers(model, processor, chosen)
    outcomes = [score(example, text) for example, text in zip(chosen, texts, strict=True)]
    print(probes.accuracy_table("family", summarise(chosen, outcomes)))
    print(probes.accuracy_table("kind", summarise_kinds(chosen, outcomes)))
    print(probes.baseline_table(chosen))
    print(probes.confusion_table(chosen, texts))
    if not options.no_probe:
        eager, _ = load(options.checkpoint or options.model, attn_implementation="eager")
        print(probes.depth_table(probes.depth(eager, processor, chosen)))


if __name__ == "__main__":
    main()
