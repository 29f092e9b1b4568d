"""Answer held-out questions densely, with visual tokens removed, and with them rerouted.

Needs nothing but this package: two models ship with it. Prints two tables and writes one HTML page.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..demo.tinyvlm import CHECKPOINTS
from ..files import check_writable
from ..report import (
    Page,
    Results,
    Row,
    Setup,
    charts,
    findings,
    html_cuts,
    html_table,
    text_cuts,
    text_table,
    write,
)
from .common import add_device_arguments, backend_of, choose_device, positive, quiet, written

if TYPE_CHECKING:
    import torch

    from ..demo.tinyvlm.conditions import Condition
    from ..demo.tinyvlm.evaluation import Outcome
    from ..demo.tinyvlm.examples import Example
    from ..report import Cost, Scene
    from ..schedule_file import ScheduleFile
    from .loading import Loaded
    from .tower import Seen

__all__ = ["add_arguments", "family_counts", "run"]

Progress = Callable[[int], object]

CONDITIONS: Final = ("clean", "noise-0.5", "noise-1", "clutter")
"""Names of ``demo.tinyvlm.conditions``, which ``--help`` does not import."""
BATCH: Final = 50
TIMED_PROMPTS: Final = 4
TIMED_BATCH: Final = 16
ROUNDS: Final = 2

NOTES: Final = (
    "avg_T: visual tokens that a layer runs, mean over all layers, counted. Rows of one block run the same share of "
    "the visual tokens to within 2 %, as measured and not as asked for (5 % is 7.0 to 7.2 of 144: one decision alone "
    "cannot have a number between 7 and 8).",
    "FastV, PDrop, Diverse, DivPrune: each on its own schedule, for either action. Those of FastV and PDrop were made "
    "for larger models; that of Diverse was chosen on validation pictures of the two demo models, one for both. "
    "Calibrated: what reroute calibrate found for this model, without labels, on validation pictures. "
    "Random: removed before the first layer.",
    "Acc@0.5: a box is right if its IoU with the true box is at least 0.5. ± in the table: binomial standard error "
    "(s.e.) of that figure. ± in the sentences: s.e. of a paired difference, as all setups got the same questions. "
    "Differences below two of these say nothing. There are many rows, so one in twenty exceeds that by chance, and the "
    "best row of a block was chosen on the questions that it is quoted for. Other first cuts were tried at 11 % only.",
    "Prefill FLOPs are computed: the decoder's, ranking included, without the vision tower and the output "
    "head. KV bytes are read off the cache after the prefill.",
    "Prefill time is measured in this run, vision tower included: median of the ratios to the dense prefill of the "
    f"same round, all setups in turn, for single prompts and for a batch of {TIMED_BATCH}. With one prompt of so "
    "small a model fixed costs (launching each operation) hide much of what FLOPs promise; bench/ measures larger "
    "prefills.",
)
TOWERS: Final = {
    "labels": "The tower of this model was trained on labels of patches, so its visual tokens are unusually clean, and "
    "a first cut by diversity is flattered; --condition noise-1 shows it without, --model text another tower. One "
    "seed, scenes of digits.",
    "text": "The tower of this model learned from short texts about whole pictures, never from labels of patches; "
    "--model labels is the other. One seed, scenes of digits.",
}
"""What to know of each demo model."""
LEAD: Final = (
    "A vision-language model reads a picture as many visual tokens, most of which no answer needs. Removing them saves "
    "as much as letting them bypass layers, and holds as long as the first cut is right. But which first cut is right "
    "for a model, a task, a noise level? Reroute lets a deferred token compete again a few layers later, at the same "
    "budget: insurance against a bad first cut. With a good one it matters little; the tables count both."
)
SCENES_LEAD: Final = (
    "One model, the same number of tokens per layer, pictures held out from training. Most of these scenes were picked "
    "because routing helps most on them; then comes a plain one-hop question and, if there is any, the question on "
    "which removing did better by most. They illustrate; the tables below count."
)
SCENE_KEEP: Final = 0.11
"""The budget that is shown layer by layer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``reroute demo``."""
    add = parser.add_argument
    add("--out", type=Path, default=Path("report.html"), metavar="HTML", help="default: %(default)s")
    add("--model", choices=CHECKPOINTS, default="labels", help="what taught its vision tower (default: %(default)s)")
    add("--questions", type=positive, default=50, metavar="N", help="of each of six kinds (default: %(default)s)")
    add("--condition", default="clean", choices=CONDITIONS, help="noise on the visual tokens, or fuller pictures")
    add("--schedule", type=Path, metavar="FILE", help="rows more, for the schedule that reroute calibrate wrote there")
    add("--seed", type=int, default=777, help="of the scenes (default: %(default)s)")
    add_device_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Evaluate, measure, print, write."""
    from ..schedule_file import ScheduleFile

    check_writable(options.out)
    extra = None if options.schedule is None else ScheduleFile.read(options.schedule)
    print("Loading the demo model …", flush=True)
    device = choose_device(options.device, options.threads)
    backend = backend_of(options.backend, device)
    with quiet():
        results, scenes, condition = _measure(options, device, extra)
    sentences = findings(results)
    about = f"demo model {options.model!r}; {condition.about}; {_machine(device)}; "
    about += f"backend {backend.name} ({backend.reason})"
    notes = (*NOTES, TOWERS[options.model])
    write(_page(results, scenes, sentences, (*notes, f"{about}.")), options.out)
    print(f"\n{text_table(results)}\n\n{_cuts_title(results)}\n{text_cuts(results)}")
    print(f"\nn = {options.questions} questions per column; {about}.", *notes, sep="\n")
    print("", *sentences, "", written(options.out), sep="\n")
    return 0


def _cuts_title(results: Results) -> str:
    return f"The same decisions and counts at {results.cuts[0][0].setup.share}, another first decision; all questions"


def _measure(
    options: argparse.Namespace, device: torch.device, extra: ScheduleFile | None
) -> tuple[Results, list[Scene], Condition]:
    from tqdm import tqdm

    from ..demo.tinyvlm.conditions import CONDITIONS
    from ..demo.tinyvlm.evaluation import prompts, summarise
    from ..transformers import adapter_of
    from .loading import load_model
    from .measure import costs
    from .scenes import demo_scenes
    from .setups import Depth, lineup
    from .tower import Seen

    condition = CONDITIONS[options.condition]
    loaded = load_model(options.model, "auto", device)
    chosen = condition.examples("test", family_counts(options.questions), options.seed)
    single = [loaded.prompt(e.image, e.question).inputs for e in _spread(chosen, TIMED_PROMPTS)]
    batch = [prompts(loaded.model, loaded.processor, _spread(chosen, TIMED_BATCH))]
    adapter = adapter_of(loaded.model)
    visual = int(sum((single[0]["input_ids"] == token).sum() for token in adapter.visual_ids))
    ways = lineup(Depth(len(adapter.layers), visual), CHECKPOINTS[options.model], extra)
    setups, seen = (*ways.table, *ways.first_cuts), Seen(loaded.model)
    prefills = (len(single) + len(batch)) * (ROUNDS + 1) * len(ways.table) + 2 * (1 + len(ways.first_cuts))
    with tqdm(total=len(setups) * len(chosen) + prefills, desc="demo", smoothing=0, dynamic_ncols=True) as bar:

        def rows(setups: Sequence[Setup], single: Sequence[Cost], many: Sequence[Cost]) -> list[Row]:
            return [
                Row(setup, one, all_.time_ratio, outcomes[setup], summarise(chosen, outcomes[setup]))
                for setup, one, all_ in zip(setups, single, many, strict=True)
            ]

        time = partial(costs, loaded.model, backend=options.backend, progress=bar.update)
        with condition.on(loaded.model):
            outcomes = {setup: _evaluate(loaded, chosen, setup, options.backend, seen, bar.update) for setup in setups}
            table = rows(ways.table, *(time(inputs, ways.table, rounds=ROUNDS) for inputs in (single, batch)))
            counted = time(single[:1], (Setup(), *ways.first_cuts), rounds=1)[1:]
            cuts = rows(ways.first_cuts, counted, counted)
            families = [example.family for example in chosen]
            results = Results(families, table, TIMED_BATCH, ways.missing, cuts)
            return results, demo_scenes(loaded, chosen, results, SCENE_KEEP, options.backend), condition


def _spread(items: Sequence[Example], count: int) -> Sequence[Example]:
    """At most ``count`` of the items, evenly spaced."""
    return items[:: max(1, len(items) // count)][:count]


def family_counts(questions: int) -> dict[str, int]:
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
    loaded: Loaded, chosen: Sequence[Example], setup: Setup, backend: str, seen: Seen, progress: Progress
) -> list[Outcome]:
    from ..demo.tinyvlm.evaluation import evaluate
    from .measure import routed

    outcomes: list[Outcome] = []
    with routed(loaded.model, setup, backend), seen.reused(setup):
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


def _page(results: Results, scenes: Sequence[Scene], sentences: Sequence[str], notes: Sequence[str]) -> Page:
    return Page(
        title="Insurance against a bad first cut",
        lead=LEAD,
        scenes=scenes,
        scenes_lead=SCENES_LEAD,
        findings=sentences,
        facts=[
            (f"{results.dense.cost.visual:.0f}", "visual tokens per picture"),
            (f"{len(results.families)}", "held-out questions"),
            (f"{len(results.rows) + len(results.first_cuts)}", "ways to run one model"),
        ],
        charts=charts(results),
        table=html_table(results) + html_cuts(results),
        notes=[
            "The model was trained densely, without any pruning or routing, on synthetic scenes of handwritten digits; "
            "the digits of these scenes were held out.",
            *notes,
        ],
    )
