"""Questions with known answers, and the accuracy of a model on them.

    python -m reroute.embedded.evaluation --split validation

The model answers through `generate()`, so whatever routing is enabled on it applies; nothing
here knows about routing. Tune on `validation`; the images of `test` are for one final figure.
"""

from __future__ import annotations

import argparse
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from PIL import Image

from . import vocabulary as vocab
from .digits import Split
from .questions import KINDS, Question, ask
from .scenes import Digit, Scene, draw, from_bins

if TYPE_CHECKING:
    from transformers import BatchFeature, LlavaForConditionalGeneration, LlavaProcessor

Box = tuple[float, float, float, float]

IOU: Final = 0.5  # a box is right when it overlaps the target's at least this much
COUNTS: Final[dict[str, int]] = {
    "attr": 100,
    "ext": 100,
    "hop": 120,
    "hopext": 80,
    "col": 40,
    "cls": 40,
    "exist": 40,
    "count": 40,
    "bg": 40,
    "hopcls": 160,
    "riddle": 200,
    "riddlecol": 160,
}
_LOCATION: Final = re.compile(r"<(\d+)>")


@dataclass(frozen=True)
class Example:
    """One question about one picture.

    `box` is the target's in pixels (x0, y0, x1, y1), also where the answer is a word about the
    target; None where no digit is meant. `digits` are all of the picture's, `target` and
    `referent` index them.
    """

    image: Image.Image
    question: str
    kind: str
    family: str
    answer: str
    box: Box | None
    digits: tuple[Digit, ...] = field(default=(), repr=False)
    target: int | None = None
    referent: int | None = None


@dataclass(frozen=True)
class Outcome:
    """Whether an answer is right; for boxes also the overlap with the target, 0 if unreadable."""

    correct: bool
    iou: float | None = None


@dataclass(frozen=True)
class Tally:
    """Accuracy over `n` questions with its binomial standard error."""

    n: int
    accuracy: float
    standard_error: float
    mean_iou: float | None


def examples(split: Split = "test", counts: Mapping[str, int] | None = None, seed: int = 777) -> list[Example]:
    """So many examples of each kind, one per picture, by default `COUNTS`.

    Deterministic: the first n of a kind do not depend on the other kinds nor on how many follow.
    """
    counts = COUNTS if counts is None else counts
    known = [kind for kind, about in KINDS.items() if about.family != "curriculum"]
    for kind in counts:
        if kind not in known:
            raise ValueError(f"unknown kind {kind!r}; known kinds are {', '.join(known)}")
    return [e for kind, count in counts.items() for e in _of_kind(split, kind, count, seed)]


def _of_kind(split: Split, kind: str, count: int, seed: int) -> list[Example]:
    name = f"{split} {kind}".encode()
    rng = np.random.default_rng([seed, zlib.crc32(name)])
    paired = KINDS[kind].paired
    found: list[Example] = []
    while len(found) < count:
        scene = draw(rng, split, (4, 8) if paired else (5, 8), paired)
        choices = ask(scene, kind, rng)
        if choices:
            found.append(_example(scene, choices[int(rng.integers(len(choices)))]))
    return found


def _example(scene: Scene, question: Question) -> Example:
    box: Box | None = None
    if question.target is not None:
        x0, y0, x1, y1 = scene.digits[question.target].box
        box = float(x0), float(y0), float(x1), float(y1)
    return Example(
        image=scene.image(),
        question=question.text,
        kind=question.kind,
        family=KINDS[question.kind].family,
        answer=" ".join(question.answer),
        box=box,
        digits=scene.digits,
        target=question.target,
        referent=question.referent,
    )


def answer_box(answer: str | Iterable[int]) -> Box | None:
    """Box in pixels of an answer, text or token ids; None unless it starts with a proper box."""
    words = answer.split() if isinstance(answer, str) else vocab.text(answer).split()
    matches = [_LOCATION.fullmatch(word) for word in words[:4]]
    bins = [int(match[1]) for match in matches if match]
    if len(bins) < 4 or max(bins) >= vocab.LOCATIONS or bins[0] > bins[2] or bins[1] > bins[3]:
        return None
    return from_bins(bins)


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    total = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return float(shared / (total - shared))


def score(example: Example, generated_text: str) -> Outcome:
    """Judge an answer: a box by its overlap with the target, a word by being the first word."""
    if KINDS[example.kind].answer == "box":
        box = answer_box(generated_text)
        iou = 0.0 if box is None or example.box is None else overlap(box, example.box)
        return Outcome(iou >= IOU, iou)
    words = generated_text.split()
    return Outcome(bool(words) and words[0] == example.answer)


def prompts(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, examples: Sequence[Example]
) -> BatchFeature:
    """Inputs of the model for a batch of examples, padded on the left, on its device."""
    chats = []
    for example in examples:
        image = {"type": "image", "image": example.image}
        text = {"type": "text", "text": example.question}
        chats.append([{"role": "user", "content": [image, text]}])
    template: Any = processor.apply_chat_template  # annotated for text alone
    inputs: BatchFeature = template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    return inputs.to(model.device, model.dtype)


def answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    examples: Sequence[Example],
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Greedy answers of the model. `progress` is told after every batch how many are done."""
    texts: list[str] = []
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        inputs = prompts(model, processor, batch)
        output = model.generate(**inputs, do_sample=False)
        assert isinstance(output, torch.Tensor)
        for new in output[:, inputs["input_ids"].shape[1] :].tolist():
            end = new.index(vocab.EOS) if vocab.EOS in new else len(new)
            texts.append(vocab.text(new[:end]))
        if progress is not None:
            progress(len(texts))
    return texts


def evaluate(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    examples: Sequence[Example],
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
) -> list[Outcome]:
    """One outcome per example, in order."""
    texts = answers(model, processor, examples, batch_size, progress)
    return [score(example, text) for example, text in zip(examples, texts, strict=True)]


def tally(outcomes: Sequence[Outcome]) -> Tally:
    """Accuracy of some outcomes; the mean overlap when all of them have one."""
    n = len(outcomes)
    accuracy = sum(outcome.correct for outcome in outcomes) / n
    overlaps = [outcome.iou for outcome in outcomes if outcome.iou is not None]
    mean = sum(overlaps) / n if len(overlaps) == n else None
    return Tally(n, accuracy, math.sqrt(accuracy * (1 - accuracy) / n), mean)


def summarise(examples: Sequence[Example], outcomes: Sequence[Outcome]) -> dict[str, Tally]:
    """Accuracy by family of questions."""
    return _grouped([example.family for example in examples], outcomes)


def summarise_kinds(examples: Sequence[Example], outcomes: Sequence[Outcome]) -> dict[str, Tally]:
    """Accuracy by kind of question."""
    return _grouped([example.kind for example in examples], outcomes)


def _grouped(names: Sequence[str], outcomes: Sequence[Outcome]) -> dict[str, Tally]:
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for name, outcome in zip(names, outcomes, strict=True):
        groups[name].append(outcome)
    return {name: tally(group) for name, group in groups.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: accuracy, baselines and the depth probe, as Markdown tables."""
    from .. import embedded
    from . import probes

    parser = argparse.ArgumentParser(
        prog="python -m reroute.embedded.evaluation", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--split", choices=("train", "validation", "test"), default="validation")
    parser.add_argument("--kinds", help="comma-separated kinds instead of the default ones")
    parser.add_argument("--count", type=int, help="examples of every kind (default: see COUNTS)")
    parser.add_argument("--seed", type=int, default=777)
    parser.add_argument("--checkpoint", type=Path, help="another checkpoint folder")
    parser.add_argument("--no-probe", action="store_true", help="leave the depth probe out")
    options = parser.parse_args(arguments)
    kinds = options.kinds.split(",") if options.kinds else list(COUNTS)
    counts = {kind: options.count or COUNTS.get(kind, 100) for kind in kinds}
    try:
        chosen = examples(options.split, counts, options.seed)
        model, processor = embedded.load(checkpoint=options.checkpoint)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"{error}\n")
    texts = answers(model, processor, chosen)
    outcomes = [score(example, text) for example, text in zip(chosen, texts, strict=True)]
    print(probes.accuracy_table("family", summarise(chosen, outcomes)))
    print(probes.accuracy_table("kind", summarise_kinds(chosen, outcomes)))
    print(probes.baseline_table(chosen))
    print(probes.confusion_table(chosen, texts))
    if not options.no_probe:
        eager, _ = embedded.load(attn_implementation="eager", checkpoint=options.checkpoint)
        print(probes.depth_table(probes.depth(eager, processor, chosen)))


if __name__ == "__main__":
    main()
