"""Training of the vision tower on text alone: captions that fit an image or do not, questions and their answers.

Captions are scored against every patch and the best matches count, as in contrastive training with late interaction
(FILIP); the loss is the sigmoid one of SigLIP. Questions attend to the patches and are answered by a linear map of what
they find. Text and boxes in it describe whole images: no loss knows which patch a digit lies in. What reads the text is
thrown away afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from reroute.demo.tinyvlm import questions
from reroute.demo.tinyvlm import vocabulary as vocab
from reroute.demo.tinyvlm.digits import Split
from reroute.demo.tinyvlm.scenes import PATCHES, Scene
from reroute.demo.tinyvlm.vocabulary import COLOURS, DIGITS, QUERY_WORDS, TEXTURES

from . import initialise
from .initialise import Pairs, WordSpace
from .packing import NO_LABEL, Mix, draw_scene, pixels_of
from .phase import Phase, generator, patch_features
from .recipe import Recipe, TextSupervision, digits_at

BACKGROUNDS: Final = tuple(f"{texture} background" for texture in TEXTURES)
# All captions are scored against all images, so those with one word changed are among the wrong ones of each.
CAPTIONS: Final = (
    *(f"a {colour} {label}" for colour in COLOURS for label in DIGITS),
    *(f"a {label}" for label in DIGITS),
    *(f"a {colour} digit" for colour in COLOURS),
    *BACKGROUNDS,
)
ASKED: Final = ("attr", "col", "cls")  # kinds of questions
SLOTS: Final = 4  # tokens of the longest answer
CAPTION_WEIGHT: Final = 0.2  # of the sum over the captions of an image
ANSWER_WEIGHT: Final = 1.5
LENGTH: Final = 8  # tokens of the longest text


@dataclass(frozen=True)
class TextBatch:
    """B scenes, which of all C captions hold, and up to Q questions about each."""

    pixels: Tensor  # float32 (B, 3, 96, 96), normalised to [-1, 1]
    holds: Tensor  # float32 (B, C)
    questions: Tensor  # int64 (B, Q, LENGTH), padded at the end
    answers: Tensor  # int64 (B, Q, SLOTS): tokens, or NO_LABEL


def encode(texts: Sequence[str]) -> Tensor:
    """Token ids of texts, int64 (n, LENGTH)."""
    ids = torch.full((len(texts), LENGTH), vocab.PAD)
    for row, text in enumerate(texts):
        words = vocab.tokens(text.split())
        ids[row, : len(words)] = torch.tensor(words)
    return ids


def captions(scene: Scene) -> set[str]:
    """The captions that hold for a scene."""
    names = [(COLOURS[digit.colour], DIGITS[digit.label]) for digit in scene.digits]
    of_digits = {text for c, label in names for text in (f"a {c} {label}", f"a {label}", f"a {c} digit")}
    return {*of_digits, BACKGROUNDS[scene.texture]}


def make_text_batch(rng: np.random.Generator, size: int, split: Split, count: tuple[int, int]) -> TextBatch:
    """Draw scenes of `count` (least, most) digits; everything follows from the generator's state."""
    drawn = [draw_scene(rng, split, Mix(digits=count, paired=0.0))[0] for _ in range(size)]
    asked = [[q for kind in ASKED for q in questions.ask(scene, kind, rng)] for scene in drawn]
    shape = (size, max(map(len, asked)))
    texts, answers = torch.full((*shape, LENGTH), vocab.PAD), torch.full((*shape, SLOTS), NO_LABEL)
    for row, about in enumerate(asked):
        texts[row, : len(about)] = encode([question.text for question in about])
        for column, question in enumerate(about):
            answers[row, column, : len(question.answer)] = torch.tensor(vocab.tokens(question.answer))
    true = [captions(scene) for scene in drawn]
    holds = torch.tensor([[float(caption in held) for caption in CAPTIONS] for held in true])
    return TextBatch(pixels_of(drawn), holds, texts, answers)


class TextHead(nn.Module):
    """Reads texts as bags of words, matches them with patches and answers them from what they match."""

    def __init__(self, width: int) -> None:
        """`width` of the tower."""
        super().__init__()
        self.embed = nn.EmbeddingBag(len(vocab.WORDS), width, mode="sum", padding_idx=vocab.PAD)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.asked = nn.Linear(width, width)
        self.readout = nn.Linear(width, SLOTS * len(vocab.WORDS))
        self.caption_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.question_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-4.0))  # most captions do not hold
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.asked.weight)

    def text(self, ids: Tensor) -> Tensor:
        """Unit vectors (..., C) of texts (..., LENGTH)."""
        words = F.normalize(self.embed(ids.view(-1, LENGTH)), dim=-1)
        unit: Tensor = F.normalize(words + self.down(F.gelu(self.up(words))), dim=-1)
        return unit.view(*ids.shape[:-1], -1)

    def similarity(self, features: Tensor, ids: Tensor) -> Tensor:
        """Cosines (B, n, PATCHES) of texts, (n, LENGTH) or (B, n, LENGTH), and patches (B, PATCHES, C)."""
        keys = F.normalize(self.key(features), dim=-1)
        cosines: Tensor = self.text(ids) @ keys.transpose(1, 2)
        return cosines

    def match(self, features: Tensor, ids: Tensor) -> Tensor:
        """Scores (B, n) of texts for images, shapes as for `similarity`."""
        scores: Tensor = (self.similarity(features, ids) * self.caption_scale.exp()).logsumexp(2)
        return scores - math.log(PATCHES) + self.bias

    def attention(self, features: Tensor, ids: Tensor) -> Tensor:
        """How texts weigh the patches of images (B, n, PATCHES), shapes as for `similarity`."""
        weights: Tensor = (self.similarity(features, ids) * self.question_scale.exp()).softmax(2)
        return weights

    def answer(self, features: Tensor, ids: Tensor) -> Tensor:
        """Logits (B, Q, SLOTS, vocabulary) of the answers to questions (B, Q, LENGTH) on features (B, PATCHES, C)."""
        found = self.attention(features, ids) @ self.value(features)
        logits: Tensor = self.readout(found + self.asked(self.text(ids)))
        return logits.view(*logits.shape[:2], SLOTS, -1)


class TextTower(Phase):
    """Captions and questions; stands in for the pre-training of a CLIP tower, frozen afterwards."""

    def __init__(self, model: LlavaForConditionalGeneration, recipe: Recipe, vision: TextSupervision) -> None:
        """Train `model`'s tower."""
        self.name, self.steps, self.rate = "vision", vision.steps, vision.rate
        self.model, self.recipe, self.vision = model, recipe, vision
        tower = model.model.vision_tower
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.head = TextHead(tower.config.hidden_size)
        self.captions = encode(CAPTIONS)
        self.modules = nn.ModuleDict({"tower": tower, "text_head": self.head})

    def begin(self) -> None:
        """Let the tower's heads look at neighbours."""
        initialise.local(self.model)

    def factor(self, step: int) -> float:
        """Warm-up, a plateau, then linearly down to zero."""
        left = (1 - step / self.steps) / (1 - self.vision.decay_from)
        return min(1.0, (step + 1) / 40) * min(1.0, left)

    def settings(self) -> str:
        """The tower's part of the recipe."""
        return repr(self.vision)

    def loss(self, rng: np.random.Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        """Whether each caption holds, and the cross entropy of the answers."""
        count = digits_at(self.vision.digits, step / self.steps)
        batch = make_text_batch(rng, self.vision.batch, "train", count)
        features = patch_features(self.model, batch.pixels)
        scores = self.head.match(features, self.captions)
        matching = F.binary_cross_entropy_with_logits(scores, batch.holds, reduction="none").sum(1).mean()
        logits = self.head.answer(features, batch.questions)
        each = F.cross_entropy(logits.flatten(0, 2), batch.answers.flatten(), ignore_index=NO_LABEL, reduction="none")
        length = (batch.answers != NO_LABEL).sum(2)  # of each answer; 0 where there is no question
        answering = (each.view_as(batch.answers).sum(2) / length.clamp(min=1)).sum() / (length > 0).sum()
        loss = CAPTION_WEIGHT * matching + ANSWER_WEIGHT * answering
        return loss, {"captions": float(matching.detach()), "answers": float(answering.detach())}

    @torch.no_grad()
    def validate(self, batches: int = 6) -> dict[str, float]:
        """Shares of right boxes (all sides within one bin), right words, and captions found among those that hold."""
        boxes, words, found = [], [], []
        for index in range(batches):
            rng = generator(self.recipe, "validation", index)
            batch = make_text_batch(rng, self.vision.batch, "validation", (5, 8))
            features = patch_features(self.model, batch.pixels)
            distance = self.head.answer(features, batch.questions).argmax(3) - batch.answers
            first, last = (batch.answers[:, :, slot] != NO_LABEL for slot in (0, -1))
            boxes.append((distance[last].abs() <= 1).all(1))
            words.append(distance[first & ~last][:, 0] == 0)
            found.append(self.head.match(features, self.captions)[batch.holds > 0] > 0)
        shares = {"box": boxes, "word": words, "caption": found}
        return {name: float(torch.cat(right).float().mean()) for name, right in shares.items()}

    def finish(self) -> None:
        """Give the language model its starting point, which needs the trained tower and the head."""
        random = torch.Generator().manual_seed(self.recipe.seed)
        initialise.mimetic(self.model, random)
        initialise.align_projector(self.model, self._described, random)

    def _described(self, index: int, space: WordSpace) -> Pairs:
        """What texts find in an image, with the words of the text and of its answer."""
        rng = generator(self.recipe, "projector", index)
        batch = make_text_batch(rng, self.vision.batch, "train", (5, 8))
        features = patch_features(self.model, batch.pixels)
        words = torch.isin(batch.questions, torch.tensor(vocab.tokens(sorted(QUERY_WORDS))))
        # Questions that name class and colour, and are answered by a box.
        whole = (words.sum(2) == 2) & (batch.answers[:, :, -1] != NO_LABEL)
        named = batch.questions[whole][words[whole]].view(-1, 2)
        digits = space.placed(space.embedding[named].sum(1), batch.answers[whole] - vocab.FIRST_LOCATION)
        texture = batch.holds[:, -len(TEXTURES) :].argmax(1)
        on_digits = self.head.attention(features, batch.questions) @ features
        on_backgrounds = self.head.attention(features, encode(BACKGROUNDS)[texture][:, None]) @ features
        target = torch.cat([digits, space.words(TEXTURES, texture)])
        return torch.cat([on_digits[whole], on_backgrounds[:, 0]]), target, torch.ones(len(target), 1)
