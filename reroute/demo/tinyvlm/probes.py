"""What the figures of `evaluation` should be read against: baselines, confusions, depth."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from .boxes import IOU, answer_box, overlap
from .evaluation import Tally, prompts
from .examples import Example
from .questions import KINDS
from .scenes import VISIBLE, coverage

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

TOP: Final = 8  # visual tokens that the depth probe looks at
# (family, what is looked for) -> share of its questions, by layer
Depth = dict[tuple[str, str], list[float]]


def baselines(examples: Sequence[Example]) -> dict[str, dict[str, float]]:
    """By kind, the accuracy of pointing at a digit without using the whole question.

    "ignores the referent" points at any digit that shares its colour with exactly one other;
    "coin flip" knows the colour but not which of the pair.
    """
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for example in examples:
        if KINDS[example.kind].answer != "box":
            continue
        rows, digits = found[example.kind], example.digits
        area = [(d.box[2] - d.box[0]) * (d.box[3] - d.box[1]) for d in digits]
        rows["any object"].append(1 / len(digits))
        rows["largest object"].append(float(int(np.argmax(area)) == example.target))
        if example.referent is not None:
            colours = [d.colour for d in digits]
            rows["ignores the referent"].append(1 / sum(colours.count(c) == 2 for c in colours))
            rows["coin flip between the pair"].append(0.5)
    return {kind: {name: sum(values) / len(values) for name, values in rows.items()} for kind, rows in found.items()}


def pointed_at(example: Example, text: str) -> str:
    """Which digit a box points at: "target", "referent", "other object" or "no object"."""
    box = answer_box(text)
    if box is None:
        return "no object"
    overlaps = [overlap(box, digit.box) for digit in example.digits]
    best = int(np.argmax(overlaps))
    if overlaps[best] < IOU:
        return "no object"
    names = {example.target: "target", example.referent: "referent"}
    return names.get(best, "other object")


def depth(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    examples: Sequence[Example],
    batch_size: int = 32,
) -> Depth:
    """At which layer the token that answers looks at which digit.

    By family, layer and digit, the share of questions for which a token on that digit is among
    the `TOP` visual tokens that the last prompt token attends to most, averaged over the heads.
    The model must have eager attention.
    """
    hits: dict[tuple[str, str], list[list[bool]]] = defaultdict(list)
    with_digit = [example for example in examples if example.target is not None]
    for start in range(0, len(with_digit), batch_size):
        batch = with_digit[start : start + batch_size]
        inputs = prompts(model, processor, batch)
        with torch.no_grad():
            attentions = model(**inputs, output_attentions=True).attentions
        visual = inputs["input_ids"] == model.config.image_token_id
        for row, example in enumerate(batch):
            scores = [layer[row, :, -1, visual[row]].mean(0) for layer in attentions]
            tops = [layer.topk(TOP).indices.tolist() for layer in scores]
            for name, index in (("target", example.target), ("referent", example.referent)):
                if index is not None:
                    covered = coverage(example.digits[index].box).ravel() > VISIBLE
                    seen = [bool(covered[top].any()) for top in tops]
                    hits[example.family, name].append(seen)
    return {key: np.array(rows).mean(0).tolist() for key, rows in hits.items()}


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def accuracy_table(title: str, tallies: Mapping[str, Tally]) -> str:
    """Accuracy with standard error, in percent."""
    rows = []
    for name, t in tallies.items():
        iou = "" if t.mean_iou is None else f"{t.mean_iou:.2f}"
        accuracy = f"{100 * t.accuracy:.1f} ± {100 * t.standard_error:.1f}"
        rows.append([name, str(t.n), accuracy, iou])
    return _table([title, "n", "accuracy %", "mean IoU"], rows)


def baseline_table(examples: Sequence[Example]) -> str:
    """The baselines, in percent."""
    rows = [
        [kind, name, f"{100 * value:.1f}"]
        for kind, values in baselines(examples).items()
        for name, value in values.items()
    ]
    return _table(["kind", "baseline", "accuracy %"], rows)


def confusion_table(examples: Sequence[Example], texts: Sequence[str]) -> str:
    """What the boxes point at, in percent."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for example, text in zip(examples, texts, strict=True):
        if KINDS[example.kind].answer == "box":
            counts[example.kind][pointed_at(example, text)] += 1
    names = ("target", "referent", "other object", "no object")
    rows = [[kind, *(f"{100 * count[name] / count.total():.0f}" for name in names)] for kind, count in counts.items()]
    return _table(["the answer points at, %", *names], rows)


def depth_table(shares: Depth) -> str:
    """The depth probe, in percent, a column per layer."""
    layers = len(next(iter(shares.values())))
    rows = [
        [f"{family}: {digit}", *(f"{100 * share:.0f}" for share in values)]
        for (family, digit), values in shares.items()
    ]
    return _table([f"in the top {TOP} at layer", *map(str, range(layers))], rows)
