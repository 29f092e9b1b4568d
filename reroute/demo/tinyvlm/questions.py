"""The questions that can be asked about a scene, with their answers.

Each kind of question is a function from a scene to all its questions of that kind. A question
is only made where its answer is unique, so "where is the seven ?" needs exactly one seven.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from .boxes import to_bins
from .scenes import Digit, Scene
from .vocabulary import COLOURS, DIGITS, EXTREMES, LOCATION_WORDS, TEXTURES

MARGIN: Final = 8  # pixels by which the leftmost digit must be further left than the next


@dataclass(frozen=True)
class Question:
    """A question, its answer in words, and the digits (their indices in the scene) it is about.

    The target is the digit that the answer describes; the referent is the digit through which a
    two-hop question names its target.
    """

    kind: str
    text: str
    answer: tuple[str, ...]
    target: int | None = None
    referent: int | None = None


@dataclass(frozen=True)
class Kind:
    """What a kind of question asks for."""

    family: str
    hops: int  # look-ups in the image that depend on each other
    answer: str  # "box" or "word"
    paired: bool  # asked about paired scenes in evaluation
    ask: Callable[[Scene, np.random.Generator], Iterator[Question]]


def _box(digit: Digit) -> tuple[str, ...]:
    return tuple(LOCATION_WORDS[value] for value in to_bins(digit.box))


def _names(scene: Scene) -> Iterator[tuple[int, str, str, bool, bool, bool]]:
    """Index, colour word and class word of every digit; whether colour, class, both name it."""
    labels = [digit.label for digit in scene.digits]
    colours = [digit.colour for digit in scene.digits]
    both = list(zip(colours, labels, strict=True))
    for i, (colour, label) in enumerate(both):
        unique = (colours.count(colour) == 1, labels.count(label) == 1, both.count(both[i]) == 1)
        yield i, COLOURS[colour], DIGITS[label], *unique


def _partner(scene: Scene, index: int) -> int | None:
    """The only other digit of the same colour, if there is exactly one."""
    colour = scene.digits[index].colour
    others = [i for i, d in enumerate(scene.digits) if d.colour == colour and i != index]
    return others[0] if len(others) == 1 else None


def _extreme(scene: Scene, members: list[int]) -> Iterator[tuple[str, int]]:
    """(word, index) of the leftmost, rightmost, top and bottom digit of a group, where clear."""
    centres = np.array([scene.digits[i].centre for i in members])
    orders = (centres[:, 0], -centres[:, 0], centres[:, 1], -centres[:, 1])
    for word, values in zip(EXTREMES, orders, strict=True):
        first, second = np.argsort(values)[:2]
        if values[second] - values[first] >= MARGIN:
            yield word, members[first]


def _attributes(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    for i, colour, label, by_colour, by_label, by_both in _names(scene):
        answer = _box(scene.digits[i])
        if by_both:
            yield Question("attr", f"where is the {colour} {label} ?", answer, i)
        if by_colour:
            yield Question("attr", f"where is the {colour} digit ?", answer, i)
        if by_label:
            yield Question("attr", f"where is the {label} ?", answer, i)


def _extremes(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    groups = [("digit", list(range(len(scene.digits))))]
    for value, colour in enumerate(COLOURS):
        same = [i for i, d in enumerate(scene.digits) if d.colour == value]
        groups.append((f"{colour} digit", same))
    for value, label in enumerate(DIGITS):
        groups.append((label, [i for i, d in enumerate(scene.digits) if d.label == value]))
    for name, members in groups:
        if len(members) >= 2:
            for word, i in _extreme(scene, members):
                yield Question("ext", f"where is the {word} {name} ?", _box(scene.digits[i]), i)


def _colour_of(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    for i, colour, label, _, by_label, _ in _names(scene):
        if by_label:
            yield Question("col", f"what colour is the {label} ?", (colour,), i)


def _class_of(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    for i, colour, label, by_colour, _, _ in _names(scene):
        if by_colour:
            yield Question("cls", f"what is the {colour} digit ?", (label,), i)


def _existence(colour: int, label: int) -> str:
    return f"is there a {COLOURS[colour]} {DIGITS[label]} ?"


def _exists(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    present = [(d.colour, d.label) for d in scene.digits]
    if rng.random() < 0.5:
        i = int(rng.integers(len(present)))
        yield Question("exist", _existence(*present[i]), ("yes",), i)
        return
    # Absent pairs mostly recombine what the scene holds: both words alone would say "yes".
    for _ in range(20):
        colour = present[rng.integers(len(present))][0]
        label = present[rng.integers(len(present))][1]
        if rng.random() >= 0.7:
            label = int(rng.integers(len(DIGITS)))
        if (colour, label) not in present:
            yield Question("exist", _existence(colour, label), ("no",))
            return


def _counts(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    colours = [d.colour for d in scene.digits]
    asked = colours[rng.integers(len(colours))]
    if rng.random() < 0.3:
        asked = int(rng.integers(len(COLOURS)))
    yield Question("count", f"how many {COLOURS[asked]} digits ?", (DIGITS[colours.count(asked)],))


def _background(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    yield Question("bg", "what is the background ?", (TEXTURES[scene.texture],))


def _riddle(label: int, rng: np.random.Generator) -> str | None:
    """A sum or difference of two digit words, neither of which is the result."""
    sums = [(a, "plus", label - a) for a in range(1, label)]
    differences = [(label + b, "minus", b) for b in range(1, 10 - label) if b != label]
    # An even draw between the operators, where both can make the result.
    choices = [group for group in (sums, differences) if group]
    if not choices:
        return None
    group = choices[rng.integers(len(choices))]
    a, operator, b = group[rng.integers(len(group))]
    return f"{DIGITS[a]} {operator} {DIGITS[b]}"


def _riddles(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    for i, _, _, _, by_label, _ in _names(scene):
        riddle = _riddle(scene.digits[i].label, rng) if by_label else None
        if riddle:
            yield Question("riddle", f"where is the {riddle} ?", _box(scene.digits[i]), i)


def _riddles_colour(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    for i, colour, _, _, by_label, _ in _names(scene):
        riddle = _riddle(scene.digits[i].label, rng) if by_label else None
        if riddle:
            yield Question("riddlecol", f"what colour is the {riddle} ?", (colour,), i)


def _hops(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    for i, _, label, _, by_label, _ in _names(scene):
        target = _partner(scene, i)
        if by_label and target is not None:
            text = f"where is the digit coloured like the {label} ?"
            yield Question("hop", text, _box(scene.digits[target]), target, i)


def _hops_hinted(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    for i, colour, label, _, _, by_both in _names(scene):
        target = _partner(scene, i)
        if by_both and target is not None:
            text = f"where is the digit coloured like the {colour} {label} ?"
            yield Question("hint", text, _box(scene.digits[target]), target, i)


def _hops_extreme(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    if len(scene.digits) < 2:
        return
    for word, i in _extreme(scene, list(range(len(scene.digits)))):
        target = _partner(scene, i)
        if target is not None:
            text = f"where is the digit coloured like the {word} digit ?"
            yield Question("hopext", text, _box(scene.digits[target]), target, i)


def _hops_class(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    for i, _, label, _, by_label, _ in _names(scene):
        target = _partner(scene, i)
        if by_label and target is not None:
            answer = (DIGITS[scene.digits[target].label],)
            text = f"what digit is coloured like the {label} ?"
            yield Question("hopcls", text, answer, target, i)


KINDS: Final[dict[str, Kind]] = {
    "attr": Kind("one-hop grounding", 1, "box", False, _attributes),
    "ext": Kind("one-hop grounding", 1, "box", False, _extremes),
    "hop": Kind("two-hop grounding", 2, "box", True, _hops),
    "hopext": Kind("two-hop grounding", 2, "box", True, _hops_extreme),
    "hint": Kind("curriculum", 1, "box", True, _hops_hinted),  # the first look-up is given in words
    "col": Kind("one-hop VQA", 1, "word", False, _colour_of),
    "cls": Kind("one-hop VQA", 1, "word", False, _class_of),
    "exist": Kind("one-hop VQA", 1, "word", False, _exists),
    "count": Kind("one-hop VQA", 1, "word", False, _counts),
    "bg": Kind("one-hop VQA", 1, "word", False, _background),
    "hopcls": Kind("two-hop VQA", 2, "word", True, _hops_class),
    "riddle": Kind("riddle grounding", 1, "box", False, _riddles),
    "riddlecol": Kind("riddle VQA", 1, "word", False, _riddles_colour),
}


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> list[Question]:
    """All questions of one kind that have exactly one answer in the scene."""
    return list(KINDS[kind].ask(scene, rng))
