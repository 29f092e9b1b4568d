from __future__ import annotations

import numpy as np
import pytest
import torch

from reroute.demo.tinyvlm import architecture, questions, scenes
from reroute.demo.tinyvlm import vocabulary as vocab
from reroute.demo.tinyvlm.boxes import to_bins
from reroute.demo.tinyvlm.scenes import GRID
from training.tinyvlm import initialise, label_tower, packing, text_tower
from training.tinyvlm.text_tower import CAPTIONS, TextHead, captions, encode, make_text_batch


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_patch_labels_mark_the_digits() -> None:
    scene = scenes.draw(rng(2), "train", (6, 8), paired=False)
    label, colour, bins = label_tower.patch_labels(scene)
    marked = {
        (int(k), int(c), tuple(b))
        for k, c, b in zip(label, colour, bins.tolist(), strict=True)
        if k != label_tower.NO_CLASS
    }
    truth = {(d.label, d.colour, to_bins(d.box)) for d in scene.digits}
    assert marked == truth


def test_captions_say_what_is_there() -> None:
    for seed in range(5):
        scene = scenes.draw(rng(seed), "train", (4, 8), paired=False)
        held = captions(scene)
        assert held <= set(CAPTIONS)
        pairs = {(d.colour, d.label) for d in scene.digits}
        for colour, name in enumerate(vocab.COLOURS):
            for label, word in enumerate(vocab.DIGITS):
                assert (f"a {name} {word}" in held) == ((colour, label) in pairs)
        assert [text for text in held if "background" in text] == [f"{vocab.TEXTURES[scene.texture]} background"]


def test_text_batch_holds_questions_and_their_answers() -> None:
    batch = make_text_batch(rng(1), 3, "train", (3, 6))
    assert batch.pixels.shape == (3, 3, 96, 96)
    assert batch.holds.shape == (3, len(CAPTIONS))
    random = rng(1)
    drawn = [packing.draw_scene(random, "train", packing.Mix(digits=(3, 6), paired=0.0))[0] for _ in range(3)]
    for row, scene in enumerate(drawn):
        asked = [q for kind in text_tower.ASKED for q in questions.ask(scene, kind, random)]
        assert len(asked) > 5
        for column, question in enumerate(asked):
            said = [token for token in batch.questions[row, column].tolist() if token != vocab.PAD]
            assert vocab.text(said) == question.text
            answer = [token for token in batch.answers[row, column].tolist() if token != packing.NO_LABEL]
            assert vocab.text(answer).split() == list(question.answer)
        assert bool((batch.answers[row, len(asked) :] == packing.NO_LABEL).all())


def test_all_texts_fit() -> None:
    drawn = [scenes.draw(rng(seed), "train", (2, 8), paired=False) for seed in range(20)]
    texts = [q.text for scene in drawn for kind in text_tower.ASKED for q in questions.ask(scene, kind, rng())]
    assert len(encode(texts)) == len(texts)
    assert len(encode(CAPTIONS)) == len(CAPTIONS)


@torch.no_grad()
def test_head_reads_each_question_and_image_alone() -> None:
    torch.manual_seed(0)
    head = TextHead(32)
    ids = encode(["where is the red seven ?", "what is the blue digit ?", "a zero"])
    features, asked = torch.randn(2, 144, 32), torch.stack([ids, ids.flip(0)])
    logits = head.answer(features, asked)
    assert logits.shape == (2, 3, text_tower.SLOTS, len(vocab.WORDS))
    scores = head.match(features, ids)
    assert scores.shape == (2, 3)
    for image in range(2):
        alone = features[image : image + 1]
        for question in range(3):
            mine = asked[image, question]
            torch.testing.assert_close(head.answer(alone, mine[None, None])[0, 0], logits[image, question])
            torch.testing.assert_close(head.match(alone, ids[question : question + 1])[0, 0], scores[image, question])


@torch.no_grad()
def test_a_patch_that_fits_raises_the_score_of_a_caption() -> None:
    torch.manual_seed(0)
    head = TextHead(32)
    head.key.weight.copy_(torch.eye(32))
    head.key.bias.zero_()
    features, ids = torch.randn(1, 144, 32), encode(["a red seven"])
    before = head.match(features, ids)
    features[0, 17] = head.text(ids)[0]
    assert head.match(features, ids) > before + 1
    assert int(head.attention(features, ids[None]).argmax()) == 17


@pytest.mark.parametrize(("layer", "shifts"), [(0, initialise.NEIGHBOURS[0]), (1, initialise.NEIGHBOURS[1])])
@torch.no_grad()
def test_heads_of_the_tower_look_at_neighbours(layer: int, shifts: tuple[tuple[int, int], ...]) -> None:
    model = architecture.build(architecture.config(1), seed=0)
    initialise.local(model)
    tower = model.model.vision_tower
    tower.config._attn_implementation = "eager"
    pixels = packing.pixels_of([scenes.draw(rng(), "train", (4, 8), paired=False)])
    attention = tower(pixels, output_attentions=True).attentions[layer][0, :, 1:, 1:]
    inner = [row * GRID + column for row in range(2, GRID - 2) for column in range(2, GRID - 2)]
    for head, (rows, columns) in enumerate(shifts):
        by_shift = {
            (r, c): float(torch.stack([attention[head, i, i + r * GRID + c] for i in inner]).mean())
            for r in (-2, -1, 0, 1, 2)
            for c in (-2, -1, 0, 1, 2)
        }
        assert max(by_shift, key=by_shift.__getitem__) == (rows, columns)
