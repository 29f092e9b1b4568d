"""Answer held-out questions densely, with visual tokens removed, and with them rerouted.

Needs nothing but this package: the model ships with it. Prints one table and writes one HTML page.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..files import check_writable
from ..report import Page, Results, Row, Setup, charts, findings, html_table, text_table, write
from .common import add_device_arguments, backend_of, choose_device, positive, quiet, written

if TYPE_CHECKING:
    import torch

    from ..demo.tinyvlm.evaluation import Outcome
    from ..demo.tinyvlm.examples import Example
    from ..report import Scene
    from .loading import Loaded

__all__ = ["SETUPS", "add_arguments", "run"]

Progress = Callable[[int], object]

BUDGETS: Final = (1 / 3, 2 / 9, 1 / 9)
SETUPS: Final = (
    Setup(),
    *(
        setup
        for keep in BUDGETS
        for setup in (
            Setup("fastv", "remove", keep),
            Setup("fastv", "route", keep),
            Setup("pdrop", "remove", keep),
            Setup("pdrop", "route", keep),
            Setup("random", "remove", keep),
        )
    ),
)
BATCH: Final = 50
TIMED_PROMPTS: Final = 6
TIMED_BATCH: Final = 16
ROUNDS: Final = 3

NOTES: Final = (
    "avg_T: visual tokens that a layer runs, mean over all layers, counted. Setups of one block have the same budget "
    "avg_T / N, up to rounding down to whole tokens.",
    "Acc@0.5: a box is right if its IoU with the true box is at least 0.5. ± in the table: binomial standard error "
    "(s.e.) of that figure. ± in the sentences: s.e. of a paired difference, as all setups got the same questions.",
    "Prefill FLOPs are computed: the decoder's, scoring by attention included, without the vision tower and the output "
    "head. KV bytes are read off the cache after the prefill.",
    "Prefill time is measured in this run, vision tower included: median of the ratios to the dense prefill of the "
    f"same round, all setups in turn, for single prompts and for a batch of {TIMED_BATCH}. With one prompt of so "
    "small a model fixed costs (launching each operation) hide much of what FLOPs promise; bench/ measures larger "
    "prefills.",
)
LEAD: Final = (
    "A vision-language model reads a picture as many visual tokens. In its first layers it is too early to say which "
    "of them will matter, so deleting them there loses what a later layer looks for. Reroute lets most tokens bypass "
    "most layers instead, and all of them compete again a few layers later: the same budget, nothing lost."
)
SCENES_LEAD: Final = (
    "One model, the same number of tokens per layer, pictures held out from training. Most of these scenes were picked "
    "because routing helps most on them; then comes a plain one-hop question and, if there is any, the question on "
    "which removing did better by most. They illustrate; the table below counts."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``reroute demo``."""
    add = parser.add_argument
    add("--out", type=Path, default=Path("report.html"), metavar="HTML", help="default: %(default)s")
    add("--questions", type=positive, default=100, metavar="N", help="of each of six kinds (default: %(default)s)")
    add("--seed", type=int, default=777, help="of the scenes (default: %(default)s)")
    add_device_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Evaluate, measure, print, write."""
    check_writable(options.out)
    print("Loading the demo model …", flush=True)
    device = choose_device(options.device, options.threads)
    backend = backend_of(options.backend, device)
    with quiet():
        results, scenes = _measure(options, device)
    sentences = findings(results)
    about = f"{_machine(device)}; backend {backend.name} ({backend.reason})"
    write(_page(results, scenes, sentences, about), options.out)
    print(f"\n{text_table(results)}\n\nn = {options.questions} questions per column; {about}.", *NOTES, sep="\n")
    print("", *sentences, "", written(options.out), sep="\n")
    return 0


def _measure(options: argparse.Namespace, device: torch.device) -> tuple[Results, list[Scene]]:
    from tqdm import tqdm

    from ..demo.tinyvlm.evaluation import prompts, summarise
    from ..demo.tinyvlm.examples import examples
    from .loading import load_model
    from .measure import costs
    from .scenes import demo_scenes

    loaded = load_model(None, "auto", device)
    chosen = examples("test", _counts(options.questions), options.seed)
    single = [loaded.prompt(e.image, e.question).inputs for e in _spread(chosen, TIMED_PROMPTS)]
    batch = [prompts(loaded.model, loaded.processor, _spread(chosen, TIMED_BATCH))]
    total = len(SETUPS) * (len(chosen) + (len(single) + len(batch)) * (ROUNDS + 1))
    with tqdm(total=total, desc="demo", unit="prompt", smoothing=0, dynamic_ncols=True) as bar:
        time = partial(costs, loaded.model, setups=SETUPS, backend=options.backend, rounds=ROUNDS, progress=bar.update)
        outcomes = [_evaluate(loaded, chosen, setup, options.backend, bar.update) for setup in SETUPS]
        columns = zip(SETUPS, time(single), time(batch), outcomes, strict=True)
        rows = [Row(setup, cost, many.time_ratio, own, summarise(chosen, own)) for setup, cost, many, own in columns]
    results = Results([example.family for example in chosen], rows, TIMED_BATCH)
    return results, demo_scenes(loaded, chosen, results, options.backend)


def _spread(items: Sequence[Example], count: int) -> Sequence[Example]:
    """At most ``count`` of the items, evenly spaced."""
    return items[:: max(1, len(items) // count)][:count]


def _counts(questions: int) -> dict[str, int]:
    """How many questions of each kind make ``questions`` of every family."""
    from ..demo.tinyvlm.examples import COUNTS
    from ..demo.tinyvlm.questions import KINDS

    families: dict[str, list[str]] = {}
    for kind in COUNTS:
        families.setdefault(KINDS[kind].family, []).append(kind)
    return {
        kind: questions // len(kinds) + (i < questions % len(kinds))
        for kinds in families.values()
        for i, kind in enumerate(kinds)
    }


def _evaluate(
    loaded: Loaded, chosen: Sequence[Example], setup: Setup, backend: str, progress: Progress
) -> list[Outcome]:
    from ..demo.tinyvlm.evaluation import evaluate
    from .measure import routed

    outcomes: list[Outcome] = []
    with routed(loaded.model, setup, backend):
        for start in range(0, len(chosen), BATCH):
            batch = chosen[start : start + BATCH]
            outcomes += evaluate(loaded.model, loaded.processor, batch, BATCH)
            progress(len(batch))
    return outcomes


def _machine(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _page(results: Results, scenes: Sequence[Scene], sentences: Sequence[str], about: str) -> Page:
    return Page(
        title="Visual tokens that may come back",
        lead=LEAD,
        scenes=scenes,
        scenes_lead=SCENES_LEAD,
        findings=sentences,
        facts=[
            (f"{results.dense.cost.visual:.0f}", "visual tokens per picture"),
            (f"{len(results.families)}", "held-out questions"),
            (f"{len(results.rows)}", "ways to run one model"),
        ],
        charts=charts(results),
        table=html_table(results),
        notes=[
            "The model was trained densely, without any pruning or routing, on synthetic scenes of handwritten digits; "
            "the digits of these scenes were held out.",
            *NOTES,
            f"{about}.",
        ],
    )
