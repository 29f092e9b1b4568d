"""Ask a model about a picture: densely, with visual tokens removed, and with them rerouted.

Takes any supported model. Prints the answers and what each cost, and writes an HTML page that shows which patches
ran where.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

from ..core.action import Action
from ..errors import RerouteError
from ..files import check_writable
from ..report import Answer, Cost, Page, Scene, Setup, html_costs, text_costs, write
from .common import add_device_arguments, backend_of, choose_device, positive, quiet, refusals, written
from .loading import DTYPES, Loaded, check_model_name, load_model, open_image

if TYPE_CHECKING:
    from PIL import Image

    from ..schedule_file import ScheduleFile

__all__ = ["add_arguments", "run"]

METHOD: Final = "diverse"
"""That of ``reroute.enable``, whose settings need torch."""
KEEP: Final = 0.33
MAX_NEW_TOKENS: Final = 64
ROUNDS: Final = 5
TIMING_S: Final = 20.0
"""Seconds after which no further round of timing begins: a large model on a CPU takes long."""

NOTES: Final = (
    "The answers are greedy. One answer says nothing about accuracy: see reroute demo, and the benchmarks, for that.",
    "avg_T: visual tokens that a layer runs, mean over all layers, counted. Prefill FLOPs are computed: the decoder's, "
    "scoring by attention included, without the vision tower and the output head. KV bytes are read off the cache "
    "after the prefill.",
    "Prefill time is measured, vision tower included, all setups in turn: the median of the ratios to the dense "
    "prefill of the same round.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``reroute run``."""
    add = parser.add_argument
    add("image", type=Path, metavar="IMAGE", help="a picture file")
    add("question", metavar="QUESTION", help='such as "where is the red seven ?"')
    add("--model", metavar="MODEL", help="a folder, a name on the Hub, or a demo model: labels (default), text")
    add("--method", help=f"how visual tokens are ranked: pdrop, fastv, … (default: {METHOD})")
    add("--schedule", type=Path, metavar="FILE", help="decisions that reroute calibrate found, instead of a method's")
    add("--action", choices=get_args(Action), help="only this one (default: both, and dense)")
    add("--compare", action="store_true", help="with --action: answer densely too")
    add("--keep", type=float, help=f"budget: share of the visual tokens per layer (default: {KEEP}, or the schedule's)")
    add("--dtype", default="auto", choices=DTYPES, help="default: %(default)s")
    add("--max-new-tokens", type=positive, metavar="N", help=f"default: the model's own, else {MAX_NEW_TOKENS}")
    add("--out", type=Path, default=Path("page.html"), metavar="HTML", help="default: %(default)s")
    add_device_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Check what can be checked early; then load, answer, print and write."""
    check_writable(options.out)
    image = open_image(options.image)
    if options.keep is not None and not 0 < options.keep < 1:
        raise RerouteError(f"--keep must lie between 0 and 1 (1 is the dense model), not {options.keep:g}.")
    if not options.question.strip():
        raise RerouteError('Ask something, such as "where is the red seven ?": the question ranks the visual tokens.')
    check_model_name(options.model)
    chosen = _chosen(options)
    device = choose_device(options.device, options.threads)
    backend = backend_of(options.backend, device)
    import torch

    print(f"Loading {options.model or 'the demo model'} …", flush=True)
    with quiet(), refusals(torch.OutOfMemoryError):
        loaded = load_model(options.model, options.dtype, device)
        scene, costs = _answer(loaded, image, chosen, options)
    about = f"{loaded.name}: {scene.layers} layers, {costs[0][1].visual:.0f} visual tokens"
    about += f"; backend {backend.name} ({backend.reason})"
    write(_page(scene, costs, about), options.out)
    _print(scene, costs, about)
    print(written(options.out))
    return 0


def _chosen(options: argparse.Namespace) -> ScheduleFile | Setup:
    """What was asked for, checked before a model is loaded.

    Raises:
        RerouteError: the method is unknown, the file holds no schedule, or both are given.
    """
    if options.schedule is None:
        setup = Setup(options.method or METHOD, keep=options.keep or KEEP)
        setup.config()
        return setup
    if options.method is not None:
        raise RerouteError("Give either --schedule or --method, which has a schedule of its own.")
    from ..schedule_file import ScheduleFile

    return ScheduleFile.read(options.schedule)


def _setups(chosen: ScheduleFile | Setup, num_layers: int, options: argparse.Namespace) -> list[Setup]:
    """The ways to route: under both actions, if none is asked for and no ratio of the schedule grows."""
    actions: Sequence[Action] = (options.action,) if options.action else ("remove", "route")
    if isinstance(chosen, Setup):
        return [replace(chosen, action=action) for action in actions]
    schedule = chosen.for_model(num_layers, options.keep)
    if options.action is None:
        try:
            schedule.validate(num_layers, "remove")
        except RerouteError as error:
            print(f"Only routed, not removed too: {error}")
            actions = ("route",)
    return [Setup("schedule", action, chosen.keep_on(num_layers), schedule) for action in actions]


def _answer(
    loaded: Loaded, image: Image.Image, chosen: ScheduleFile | Setup, options: argparse.Namespace
) -> tuple[Scene, list[tuple[Setup, Cost]]]:
    from ..transformers import adapter_of
    from .measure import costs, routed
    from .scenes import make_scene, read_tinyvlm

    setups = _setups(chosen, len(adapter_of(loaded.model).layers), options)
    for setup in setups:
        with routed(loaded.model, setup, options.backend):
            pass  # a budget out of reach is refused before anything runs
    prompt = loaded.prompt(image, options.question)
    asked = setups if options.action and not options.compare else [Setup(), *setups]
    longest = options.max_new_tokens or loaded.model.generation_config.max_new_tokens or MAX_NEW_TOKENS
    read = read_tinyvlm if loaded.is_tinyvlm else Answer
    scene = make_scene(loaded, prompt, asked, options.backend, read, longest)
    timed = [Setup(), *setups]
    spent = costs(loaded.model, [prompt.inputs], timed, options.backend, rounds=ROUNDS, limit_s=TIMING_S)
    return scene, list(zip(timed, spent, strict=True))


def _print(scene: Scene, costs: Sequence[tuple[Setup, Cost]], about: str) -> None:
    print(f"\n{about}\n{scene.question}\n")
    answers = [("dense", scene.dense)] if scene.dense else []
    answers += [(run.setup.name, run.answer) for run in scene.runs]
    width = max(15, *(len(name) + 2 for name, _ in answers))
    for name, answer in answers:
        print(f"{name:{width}}{answer.text}")
    print(f"\n{text_costs(costs)}\n")
    for run in scene.runs:
        print(f"{run.setup.name:{width}}active in layers {', '.join(map(str, run.stages))}")
    print()


def _page(scene: Scene, costs: Sequence[tuple[Setup, Cost]], about: str) -> Page:
    dense = costs[0][1]
    return Page(
        title=scene.question,
        lead="Which patches of the picture ran in which layers, and what the model answered. "
        f"Method {costs[-1][0].title}, budget avg_T / N = {costs[-1][0].budget}.",
        scenes=[scene],
        scenes_lead="Both actions run the same number of visual tokens per layer. Removing takes them away for good; "
        "routing lets them bypass some layers and compete again.",
        facts=[
            (
                f"{cost.flops / dense.flops:.0%}",
                f"of the dense FLOPs, {cost.time_ratio:.2f} of the dense time: {setup.name}",
            )
            for setup, cost in costs[1:]
        ],
        table=html_costs(costs),
        notes=[*NOTES, f"{about}."],
    )
