"""Ask a model about a picture: densely, with visual tokens removed, and with them rerouted.

Takes any supported model. Prints the answers and what each cost, and writes an HTML page that shows which patches
ran where.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

from ..core.action import Action
from ..errors import RerouteError
from ..report import Answer, Cost, Page, Scene, Setup, check_writable, html_costs, text_costs, write
from .common import add_device_arguments, backend_of, choose_device, positive, quiet, refusals, written
from .loading import Loaded, load_model, open_image

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["add_arguments", "run"]

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
    add("--model", metavar="PATH_OR_ID", help="a folder, or a name on the Hub (default: the demo model)")
    add("--method", default="pdrop", help="how visual tokens are ranked: fastv, pdrop, … (default: %(default)s)")
    add("--action", choices=get_args(Action), help="only this one (default: both, and dense)")
    add("--compare", action="store_true", help="with --action: answer densely too")
    add("--keep", type=float, default=0.33, help="budget: share of the visual tokens per layer (default: %(default)s)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="default: %(default)s")
    add("--max-new-tokens", type=positive, metavar="N", help=f"default: the model's own, else {MAX_NEW_TOKENS}")
    add("--out", type=Path, default=Path("page.html"), metavar="HTML", help="default: %(default)s")
    add_device_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Check what can be checked early; then load, answer, print and write."""
    check_writable(options.out)
    image = open_image(options.image)
    if not 0 < options.keep < 1:
        raise RerouteError(f"--keep must lie between 0 and 1 (1 is the dense model), not {options.keep:g}.")
    device = choose_device(options.device, options.threads)
    backend = backend_of(options.backend, device)
    import torch

    Setup(options.method, keep=options.keep).config()  # an unknown method is refused before a model is loaded
    print(f"Loading {options.model or 'the demo model'} …", flush=True)
    with quiet(), refusals(torch.OutOfMemoryError):
        loaded = load_model(options.model, options.dtype, device)
        scene, costs = _answer(loaded, image, options)
    about = f"{loaded.name}: {scene.layers} layers, {costs[0][1].visual:.0f} visual tokens"
    about += f"; backend {backend.name} ({backend.reason})"
    write(_page(scene, costs, about), options.out)
    _print(scene, costs, about)
    print(written(options.out))
    return 0


def _answer(loaded: Loaded, image: Image.Image, options: argparse.Namespace) -> tuple[Scene, list[tuple[Setup, Cost]]]:
    from .measure import costs, routed
    from .scenes import make_scene, read_tinyvlm

    actions: Sequence[Action] = (options.action,) if options.action else ("remove", "route")
    setups = [Setup(options.method, action, options.keep) for action in actions]
    for setup in setups:
        with routed(loaded.model, setup, options.backend):
            pass  # a budget out of reach is refused before anything runs
    prompt = loaded.prompt(image, _known_words(options.question) if loaded.is_tinyvlm else options.question)
    asked = setups if options.action and not options.compare else [Setup(), *setups]
    longest = options.max_new_tokens or loaded.model.generation_config.max_new_tokens or MAX_NEW_TOKENS
    read = read_tinyvlm if loaded.is_tinyvlm else Answer
    scene = make_scene(loaded, prompt, asked, options.backend, read, longest)
    timed = [Setup(), *setups]
    spent = costs(loaded.model, [prompt.inputs], timed, options.backend, rounds=ROUNDS, limit_s=TIMING_S)
    return scene, list(zip(timed, spent, strict=True))


def _known_words(question: str) -> str:
    """The question as tinyvlm was taught to read: lower case, words apart.

    Raises:
        RerouteError: it holds words that the model never saw.
    """
    from ..demo.tinyvlm.vocabulary import TOKENS

    words = re.findall(r"[^\s?]+|\?", question.lower())
    strange = [word for word in words if word not in TOKENS]
    if strange:
        raise RerouteError(
            f"The demo model does not know {', '.join(map(repr, strange))}. It answers questions about scenes of "
            'coloured digits, such as "where is the red seven ?"; for others name a model with --model.'
        )
    return " ".join(words)


def _print(scene: Scene, costs: Sequence[tuple[Setup, Cost]], about: str) -> None:
    print(f"\n{about}\n{scene.question}\n")
    answers = [("dense", scene.dense)] if scene.dense else []
    for name, answer in [*answers, *((run.setup.name, run.answer) for run in scene.runs)]:
        print(f"{name:15}{answer.text}")
    print(f"\n{text_costs(costs)}\n")
    for run in scene.runs:
        print(f"{run.setup.name:15}active in layers {', '.join(map(str, run.stages))}")
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
