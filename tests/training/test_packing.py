from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from reroute.demo.tinyvlm import architecture, questions, scenes
from reroute.demo.tinyvlm import vocabulary as vocab
from reroute.demo.tinyvlm.scenes import PATCHES
from training.tinyvlm import packing
from training.tinyvlm.packing import KIND_NAMES, NO_LABEL, WORD, Batch, Mix, make_batch
from training.tinyvlm.phases import labelled_logits

MIX = Mix(digits=(4, 7), paired=0.5, query_last=0.3, hints=0.5)


def batch(seed: int = 0, size: int = 3, mix: Mix = MIX) -> Batch:
    return make_batch(np.random.default_rng(seed), size, "train", mix)


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    model = architecture.build(architecture.config(2, 32, 1), seed=0)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def test_batch_follows_from_the_generator() -> None:
    a, b = batch(1), batch(1)
    assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in vars(a))
    assert not torch.equal(a.ids, batch(2).ids)


def test_rows_start_with_the_image() -> None:
    ids = batch().ids
    start = len(vocab.PREFIX)
    assert ids[0, :start].tolist() == list(vocab.PREFIX)
    assert bool((ids[:, start : packing.IMAGE_END] == vocab.IMAGE).all())
    assert int((ids == vocab.IMAGE).sum()) == len(ids) * PATCHES


def test_mask_is_causal_within_a_question_and_over_the_image() -> None:
    segments = torch.tensor([[0, 0, 1, 1, 2, 2, -1]])
    expected = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    assert packing.attention_mask(segments)[0, 0].long().tolist() == expected


@torch.no_grad()
def test_packed_question_equals_the_question_alone(model: LlavaForConditionalGeneration) -> None:
    packed = batch()
    logits = labelled_logits(model, packed)
    where = (packed.labels != NO_LABEL).nonzero()
    compared = 0
    for row in range(len(packed.ids)):
        for segment in range(1, int(packed.segments[row].max()) + 1):
            member = packed.segments[row] == segment
            ids = torch.cat([packed.ids[row, : packing.IMAGE_END], packed.ids[row, member]])
            alone = model(input_ids=ids[None], pixel_values=packed.pixels[row : row + 1]).logits[0]
            labels = packed.labels[row, member]
            chosen = alone[packing.IMAGE_END :][labels != NO_LABEL]
            mine = (where[:, 0] == row) & member[where[:, 1]]
            torch.testing.assert_close(logits[mine], chosen, atol=2e-5, rtol=1e-4)
            compared += len(chosen)
    assert compared == len(logits) > 50


def test_labels_are_the_next_token_and_end_with_eos() -> None:
    packed = batch(4)
    answer = (packed.labels != NO_LABEL) & (packed.kinds != WORD)
    for row, column in answer.nonzero().tolist():
        label = int(packed.labels[row, column])
        if label != vocab.EOS:
            assert int(packed.ids[row, column + 1]) == label
            assert packed.segments[row, column + 1] == packed.segments[row, column]
    for row in range(len(packed.ids)):
        segments = packed.segments[row, answer[row] & (packed.labels[row] == vocab.EOS)].tolist()
        assert segments == list(range(1, int(packed.segments[row].max()) + 1))


def test_word_labels() -> None:
    rng = np.random.default_rng(0)
    colour_of, result = 0, 0
    for index in range(40):
        scene = scenes.draw(rng, "train", (4, 7), paired=bool(index % 2))
        for kind in ("attr", "hop", "riddle", "ext"):
            for question in questions.ask(scene, kind, rng):
                extra = packing.word_label(question, scene)
                words = question.text.split()
                if kind == "riddle":
                    assert extra is not None
                    assert words[extra[0] + 1] == "?"
                    assert question.target is not None
                    target = scene.digits[question.target]
                    assert vocab.WORDS[extra[1]] == vocab.DIGITS[target.label]
                    result += 1
                elif kind == "hop":
                    assert extra is not None
                    assert words[extra[0]] in vocab.DIGITS
                    assert question.referent is not None
                    referent = scene.digits[question.referent]
                    assert vocab.WORDS[extra[1]] == vocab.COLOURS[referent.colour]
                    colour_of += 1
                elif words[2] == "the" and words[3] in vocab.EXTREMES:
                    assert extra is None
    assert min(colour_of, result) > 20


def test_mix_controls_what_is_asked() -> None:
    def kinds(**settings: Any) -> set[str]:
        present = batch(7, 12, Mix(digits=(5, 8), **settings)).kinds.unique()
        return {KIND_NAMES[index] for index in present.tolist() if index >= 0}

    assert not kinds(riddles=0.0) & {"riddle", "riddlecol"}
    assert kinds(riddles=1.0) >= {"riddle", "riddlecol"}
    assert "hopext" not in kinds(extremes=0.0)
    assert "hint" not in kinds(hints=0.0)
    assert kinds(paired=1.0, hints=1.0) >= {"hint", "hop", "hopcls", "hopext"}
    assert not kinds(paired=0.0) & {"hint", "hop", "hopcls", "hopext"}


def test_query_words_move_to_the_end() -> None:
    moved = vocab.text(vocab.prompt_query_last("where is the two plus five ?"))
    assert moved == "where is the ? assistant : two plus five"
    assert vocab.text(vocab.prompt("where is the red digit ?")).endswith("? assistant :")
