"""Every question is answered again by a solver that knows only the text and the scene."""

from __future__ import annotations

import re

import numpy as np
import pytest

from reroute.demo.tinyvlm.boxes import to_bins
from reroute.demo.tinyvlm.questions import KINDS, MARGIN, Question, ask
from reroute.demo.tinyvlm.scenes import Digit, Scene, draw
from reroute.demo.tinyvlm.vocabulary import COLOURS, DIGITS, TEXTURES, TOKENS


def find(scene: Scene, phrase: str) -> list[Digit]:
    """Digits that a phrase such as "leftmost red digit" or "two plus five" may mean."""
    words = phrase.split()
    if "like" in words:
        (referent,) = find(scene, phrase.split(" like the ")[1])
        return [d for d in scene.digits if d.colour == referent.colour and d is not referent]
    if "plus" in words or "minus" in words:
        a, b = DIGITS.index(words[0]), DIGITS.index(words[2])
        result = a + b if words[1] == "plus" else a - b
        assert result not in (a, b), "a riddle must not name its answer"
        return [d for d in scene.digits if d.label == result]
    found = list(scene.digits)
    for word in words:
        if word in COLOURS:
            found = [d for d in found if COLOURS[d.colour] == word]
        elif word in DIGITS:
            found = [d for d in found if DIGITS[d.label] == word]
    axes = {"leftmost": (0, 1), "rightmost": (0, -1), "top": (1, 1), "bottom": (1, -1)}
    if words[0] in axes:
        axis, sign = axes[words[0]]
        found.sort(key=lambda d: sign * (d.box[axis] + d.box[axis + 2]) / 2)
        first, second = (d.box[axis] + d.box[axis + 2] for d in found[:2])
        assert abs(first - second) / 2 >= MARGIN
        found = found[:1]
    return found


def solve(scene: Scene, text: str) -> tuple[str, ...]:
    """The answer of a question in words."""
    if match := re.fullmatch(r"where is the (.*) \?", text):
        (digit,) = find(scene, match[1])
        return tuple(f"<{value}>" for value in to_bins(digit.box))
    if match := re.fullmatch(r"what colour is the (.*) \?", text):
        (digit,) = find(scene, match[1])
        return (COLOURS[digit.colour],)
    if match := re.fullmatch(r"what digit is (coloured like .*) \?", text):
        (digit,) = find(scene, match[1])
        return (DIGITS[digit.label],)
    if text == "what is the background ?":
        return (TEXTURES[scene.texture],)
    if match := re.fullmatch(r"what is the (.*) \?", text):
        (digit,) = find(scene, match[1])
        return (DIGITS[digit.label],)
    if match := re.fullmatch(r"is there a (.*) \?", text):
        return ("yes" if find(scene, match[1]) else "no",)
    match = re.fullmatch(r"how many (.*) digits \?", text)
    assert match
    return (DIGITS[len(find(scene, match[1]))],)


def collect(kind: str, count: int = 150) -> list[tuple[Scene, Question]]:
    rng = np.random.default_rng(3)
    found: list[tuple[Scene, Question]] = []
    for index in range(count):
        scene = draw(rng, "validation", (3, 8), paired=bool(index % 2))
        found += [(scene, question) for question in ask(scene, kind, rng)]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_the_only_right_one(kind: str) -> None:
    found = collect(kind)
    assert len(found) >= 60
    for scene, question in found:
        assert question.kind == kind
        assert solve(scene, question.text) == question.answer
        assert all(word in TOKENS for word in question.text.split())
        assert len(question.answer) == (4 if KINDS[kind].answer == "box" else 1)
        if KINDS[kind].answer == "box":
            assert question.target is not None
            target = scene.digits[question.target]
            assert question.answer == tuple(f"<{value}>" for value in to_bins(target.box))


@pytest.mark.parametrize("kind", [kind for kind, about in KINDS.items() if about.hops == 2])
def test_two_hop_questions_go_through_another_digit(kind: str) -> None:
    for scene, question in collect(kind, 40):
        assert question.target is not None
        assert question.referent is not None
        target, referent = scene.digits[question.target], scene.digits[question.referent]
        assert target is not referent
        assert target.colour == referent.colour
        words = question.text.split()
        assert not {COLOURS[target.colour], DIGITS[target.label]} & set(words)


def test_texts_of_a_kind_are_distinct() -> None:
    rng = np.random.default_rng(4)
    for index in range(60):
        scene = draw(rng, "train", (4, 8), paired=bool(index % 2))
        for kind in KINDS:
            texts = [question.text for question in ask(scene, kind, rng)]
            assert len(set(texts)) == len(texts)


def test_existence_is_asked_evenly() -> None:
    answers = [question.answer[0] for _, question in collect("exist", 300)]
    assert 0.4 < answers.count("yes") / len(answers) < 0.6


def test_riddles_use_both_operators_and_many_results() -> None:
    texts = [question.text for _, question in collect("riddle", 300)]
    plus = sum("plus" in text for text in texts) / len(texts)
    assert 0.25 < plus < 0.6
    results = {
        question.target is not None and scene.digits[question.target].label
        for scene, question in collect("riddle", 300)
    }
    assert results == set(range(10))
