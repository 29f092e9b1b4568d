"""What a model answers to the examples, and how often it is right.

The model answers through `generate()`, so whatever routing is enabled on it applies; nothing
here knows about routing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from . import vocabulary as vocab
from .boxes import IOU, answer_box, overlap
from .examples import Example
from .questions import KINDS

if TYPE_CHECKING:
    from transformers import BatchFeature, LlavaForConditionalGeneration, LlavaProcessor


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
    return summarise_families([example.family for example in examples], outcomes)


def summarise_families(families: Sequence[str], outcomes: Sequence[Outcome]) -> dict[str, Tally]:
    """Accuracy by family, of outcomes of questions of these `families`."""
    return _grouped(families, outcomes)


def summarise_kinds(examples: Sequence[Example], outcomes: Sequence[Outcome]) -> dict[str, Tally]:
    """Accuracy by kind of question."""
    return _grouped([example.kind for example in examples], outcomes)


def _grouped(names: Sequence[str], outcomes: Sequence[Outcome]) -> dict[str, Tally]:
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for name, outcome in zip(names, outcomes, strict=True):
        groups[name].append(outcome)
    return {name: tally(group) for name, group in groups.items()}
