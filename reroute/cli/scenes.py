"""Scenes for the page: one picture and one question, run in several ways, with what was decided on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from ..demo.tinyvlm.boxes import Box, answer_box
from ..demo.tinyvlm.evaluation import score
from ..demo.tinyvlm.examples import Example
from ..demo.tinyvlm.scenes import SIDE
from ..errors import RerouteError
from ..report import Answer, Results, Routed, Scene, Setup
from ..report.scene import stages_of
from ..transformers import ModelAdapter, adapter_of
from .loading import Loaded, Prompt
from .measure import routed

__all__ = ["demo_scenes", "make_scene", "pick", "read_tinyvlm"]

Reader = Callable[[str], Answer]
PICKS: Final = (
    ("two-hop grounding", 2),
    ("riddle grounding", 1),
    ("two-hop VQA", 1),
    ("riddle VQA", 1),
)
"""How many scenes of which kinds: those on which routing and removing differ most."""


def make_scene(
    loaded: Loaded,
    prompt: Prompt,
    setups: Sequence[Setup],
    backend: str,
    read: Reader,
    max_new_tokens: int | None = None,
) -> Scene:
    """Answer one prompt in every setup. ``read`` turns what the model says into an answer.

    Raises:
        RerouteError: which patch each visual token shows is not known; nothing is run then.
    """
    adapter = adapter_of(loaded.model)
    layers, grid = len(adapter.layers), _grid(adapter, prompt)
    dense, runs = None, []
    for setup in setups:
        with routed(loaded.model, setup, backend, trace=True) as handle:
            answer = read(_generate(loaded, prompt, max_new_tokens))
            if handle is None:
                dense = answer
            else:
                assert handle.trace is not None
                runs.append(Routed(setup, answer, stages_of(handle.trace, layers)))
    return Scene(prompt.image, grid, layers, loaded.name, prompt.question, runs, dense)


def _grid(adapter: ModelAdapter, prompt: Prompt) -> tuple[int, int]:
    """Rows and columns of the visual tokens of the picture.

    Raises:
        RerouteError: there is not exactly one, or its grid is not known.
    """
    (grids,) = adapter.image_grids(prompt.inputs)
    if len(grids) != 1:
        raise RerouteError(f"A page shows one picture, and the prompt has {len(grids)}. Ask about one at a time.")
    return grids[0]


def _generate(loaded: Loaded, prompt: Prompt, max_new_tokens: int | None) -> str:
    """The greedy answer to a prompt."""
    length = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    output = loaded.model.generate(**prompt.inputs, do_sample=False, **length)
    new = output[0, prompt.inputs["input_ids"].shape[1] :]
    return str(loaded.processor.decode(new, skip_special_tokens=True)).strip()


def read_tinyvlm(text: str) -> Answer:
    """An answer of tinyvlm: a word, or four location words for a box."""
    box = answer_box(text)
    return Answer(text) if box is None else _boxed(box)


def _boxed(box: Box) -> Answer:
    x0, y0, x1, y1 = box
    return Answer(f"box x {x0:.0f}-{x1:.0f}, y {y0:.0f}-{y1:.0f}", (x0 / SIDE, y0 / SIDE, x1 / SIDE, y1 / SIDE))


def demo_scenes(
    loaded: Loaded, examples: Sequence[Example], results: Results, keep: float, backend: str
) -> list[Scene]:
    """The scenes that ``pick`` chooses, in all setups of the budget ``keep`` that were both routed and removed."""
    pairs = [pair for pair in results.pairs if pair[0].setup.keep == keep]
    setups = [results.dense.setup, *(row.setup for route, remove in pairs for row in (remove, route))]
    scenes = []
    for index, why in pick(results):
        example = examples[index]
        prompt = loaded.prompt(example.image, example.question)
        scene = make_scene(loaded, prompt, setups, backend, partial(_judged, example))
        scenes.append(replace(scene, kind=example.family, truth=_truth(example), why=why))
    return scenes


def _judged(example: Example, text: str) -> Answer:
    outcome = score(example, text)
    return replace(read_tinyvlm(text), correct=outcome.correct, iou=outcome.iou)


def _truth(example: Example) -> Answer:
    if example.box is None:
        return Answer(example.answer)
    boxed = _boxed(example.box)
    return boxed if example.family.endswith("grounding") else replace(boxed, text=example.answer)


def pick(results: Results) -> list[tuple[int, str]]:
    """Indices of the questions to show, each with the reason: see ``PICKS``.

    After these an ordinary one-hop question, the first that was answered densely, and the one on which removing did
    better by most, if there is any. Among equals the first; questions that the dense model answers are preferred.
    """
    total, questions = len(results.pairs), range(len(results.families))
    routes = [sum(route.outcomes[i].correct for route, _ in results.pairs) for i in questions]
    removes = [sum(remove.outcomes[i].correct for _, remove in results.pairs) for i in questions]
    lead = [a - b for a, b in zip(routes, removes, strict=True)]
    wrong = [not outcome.correct for outcome in results.dense.outcomes]

    chosen: list[int] = []
    for family, count in PICKS:
        own = [i for i in questions if results.families[i] == family]
        chosen += sorted(own, key=lambda i: (-lead[i], wrong[i]))[:count]
    easy = [i for i in questions if results.families[i] == "one-hop grounding"]
    chosen += sorted(easy, key=lambda i: wrong[i])[:1]
    worst = min(questions, key=lambda i: lead[i])
    if lead[worst] < 0 and worst not in chosen:
        chosen.append(worst)
    return [(i, f"right in {routes[i]} of {total} routed and {removes[i]} of {total} removed runs") for i in chosen]
