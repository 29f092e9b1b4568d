"""What one optimiser step computes, for the vision tower and for the language model."""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from reroute.demo.tinyvlm import vocabulary as vocab
from reroute.demo.tinyvlm.scenes import PATCHES

from . import initialise, packing
from .muon import Muon
from .packing import KIND_NAMES, NO_CLASS, NO_COLOUR, Batch, Mix, make_batch
from .recipe import Recipe, Stage

SCENES_ONLY: Final = Mix(paired=0.0, room=0)
# Kinds whose answer needs two steps of thought: their first answer tokens weigh double.
HARD: Final = tuple(
    index for index, name in enumerate(KIND_NAMES) if name in ("hop", "hopext", "hint", "hopcls", "riddle", "riddlecol")
)


def generator(recipe: Recipe, name: str, step: int) -> np.random.Generator:
    """The source of all of one step's randomness: depends on seed, stage name and step alone."""
    return np.random.default_rng([recipe.seed, zlib.crc32(name.encode()), step])


class Phase(ABC):
    """A stretch of training with one optimiser state."""

    name: str
    steps: int
    rate: float
    modules: nn.ModuleDict  # what is trained; named, so that checkpoints say what they hold

    @abstractmethod
    def loss(self, rng: np.random.Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of one step on fresh data, and figures for the log."""

    @abstractmethod
    def factor(self, step: int) -> float:
        """The learning rate of a step, relative to its peak."""

    @abstractmethod
    def settings(self) -> str:
        """Everything in the recipe that the phase's result depends on, besides the seed."""

    @abstractmethod
    def validate(self, batches: int = 6) -> dict[str, float]:
        """Figures on validation images."""

    def finish(self) -> None:  # noqa: B027 - most phases have nothing to do
        """Called once after the last step."""

    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained."""
        return list(self.modules.parameters())

    def optimisers(self) -> list[torch.optim.Optimizer]:
        """Muon for the matrices, AdamW at half the rate for embeddings, biases and the rest."""
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.modules.named_parameters():
            lookup = "embed" in name or name.startswith("patch_head")
            (others if parameter.ndim != 2 or lookup else matrices).append(parameter)
        adam = torch.optim.AdamW(others, lr=self.rate / 2, betas=(0.9, 0.98), weight_decay=0.0)
        return [Muon(matrices, lr=self.rate), adam]


class VisionPhase(Phase):
    """Dense patch labels; stands in for the pre-training of a CLIP tower, frozen afterwards."""

    def __init__(self, model: LlavaForConditionalGeneration, recipe: Recipe) -> None:
        """Train `model`'s tower."""
        self.name, self.steps, self.rate = "vision", recipe.vision_steps, recipe.vision_rate
        self.model, self.recipe = model, recipe
        self.tower = model.model.vision_tower
        self.sizes = [NO_CLASS + 1, NO_COLOUR + 1, 4 * vocab.LOCATIONS, len(vocab.TEXTURES)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            head = nn.Linear(self.tower.config.hidden_size, sum(self.sizes))
        self.modules = nn.ModuleDict({"tower": self.tower, "patch_head": head})

    def factor(self, step: int) -> float:
        """Warm-up, a plateau, then linearly down to zero."""
        done = step / self.steps
        return min(1.0, (step + 1) / 30) * min(1.0, (1 - done) / 0.7)

    def settings(self) -> str:
        """Steps, batch and rate."""
        return f"{self.steps} {self.recipe.vision_batch} {self.rate}"

    def _predict(self, batch: Batch) -> tuple[Tensor, ...]:
        """Logits of class, colour, box and texture of every patch, each (B * PATCHES, n)."""
        hidden = self.tower(batch.pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        logits: Tensor = self.modules["patch_head"](hidden).flatten(0, 1)
        return torch.split(logits, self.sizes, dim=1)

    def loss(self, rng: np.random.Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        """Cross entropies of a patch's class, colour, box bins and texture."""
        batch = make_batch(rng, self.recipe.vision_batch, "train", SCENES_ONLY)
        label, colour, box, texture = self._predict(batch)
        gold = batch.patch_class.flatten()
        digit = gold < NO_CLASS
        bins = batch.patch_bins.flatten(0, 1)[digit].flatten()
        loss = (
            F.cross_entropy(label, gold)
            + F.cross_entropy(label[digit], gold[digit])  # background patches outnumber digits
            + F.cross_entropy(colour, batch.patch_colour.flatten())
            + F.cross_entropy(box[digit].reshape(-1, vocab.LOCATIONS), bins)
            + 0.2 * F.cross_entropy(texture, batch.texture.repeat_interleave(PATCHES))
        )
        return loss, {"loss": float(loss.detach())}

    @torch.no_grad()
    def validate(self, batches: int = 6) -> dict[str, float]:
        """Shares of digit patches whose class and colour are right."""
        right = torch.zeros(2)
        total = 0
        for index in range(batches):
            rng = generator(self.recipe, "validation", index)
            batch = make_batch(rng, self.recipe.vision_batch, "validation", SCENES_ONLY)
            label, colour, _, _ = self._predict(batch)
            gold, shade = batch.patch_class.flatten(), batch.patch_colour.flatten()
            digit = gold < NO_CLASS
            right[0] += (label.argmax(1) == gold)[digit].sum()
            right[1] += (colour.argmax(1) == shade)[digit].sum()
            total += int(digit.sum())
        return {"class": float(right[0]) / total, "colour": float(right[1]) / total}

    def finish(self) -> None:
        """Give the language model its starting point, which needs the trained tower."""
        random = torch.Generator().manual_seed(self.recipe.seed)
        draw = lambda index: make_batch(generator(self.recipe, "projector", index), 24, "train", SCENES_ONLY)
        initialise.mimetic(self.model, random)
        initialise.align_projector(self.model, draw, random)


class LanguagePhase(Phase):
    """Questions and answers; the tower is frozen. Dense: every layer sees every token."""

    def __init__(self, model: LlavaForConditionalGeneration, recipe: Recipe, stage: Stage) -> None:
        """Train the rest of `model` on the mixture of `stage`."""
        self.name, self.steps, self.rate = stage.name, stage.steps, stage.rate
        self.model, self.recipe, self.stage = model, recipe, stage
        self.modules = nn.ModuleDict(
            {
                "language": model.model.language_model,
                "projector": model.model.multi_modal_projector,
                "lm_head": model.lm_head,
            }
        )

    def factor(self, step: int) -> float:
        """Warm-up, a plateau, then optionally a cosine down to one percent."""
        done, start = step / self.steps, self.stage.decay_from
        warm = min(1.0, (step + 1) / 40)
        if done < start:
            return warm
        return warm * max(0.01, 0.5 + 0.5 * math.cos(math.pi * (done - start) / (1 - start)))

    def settings(self) -> str:
        """The stage as the recipe gives it."""
        return repr(self.stage)

    def loss(self, rng: np.random.Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        """Weighted cross entropy of the answers, and of the word labels."""
        mix = self.stage.mix(step / self.steps)
        batch = make_batch(rng, self.stage.batch, "train", mix)
        labels, kinds, slots = _labelled(batch)
        each = F.cross_entropy(labelled_logits(self.model, batch), labels, reduction="none")
        weight = _weights(labels, kinds, slots)
        first = each.detach()[slots == 0]
        means = dict(_by_kind(first, kinds[slots == 0]))
        return (each * weight).sum() / weight.sum(), means

    @torch.no_grad()
    def validate(self, batches: int = 6) -> dict[str, float]:
        """By kind, the share of right first answer tokens (locations: within one bin)."""
        right, kinds = [], []
        for index in range(batches):
            rng = generator(self.recipe, "validation", index)
            batch = make_batch(rng, 16, "validation", Mix(hints=0.2))
            labels, kind, slots = _labelled(batch)
            guess = labelled_logits(self.model, batch).argmax(1)
            distance = (guess - labels).abs()
            right.append((distance <= _is_location(labels).long())[slots == 0].float())
            kinds.append(kind[slots == 0])
        return dict(_by_kind(torch.cat(right), torch.cat(kinds)))


def labelled_logits(model: LlavaForConditionalGeneration, batch: Batch) -> Tensor:
    """Logits (labels, vocabulary) at the labelled positions only, which saves the rest."""
    language = model.model.language_model
    # The tower is frozen; without a graph its activations need not be kept.
    with torch.no_grad():
        hidden = model.model.vision_tower(batch.pixels, output_hidden_states=True).hidden_states
    visual = model.model.multi_modal_projector(hidden[-1][:, 1:])
    words = language.embed_tokens(batch.ids)
    start = packing.IMAGE_END - PATCHES
    embeddings = torch.cat([words[:, :start], visual, words[:, packing.IMAGE_END :]], 1)
    output = language(
        inputs_embeds=embeddings,
        attention_mask=packing.attention_mask(batch.segments),
        position_ids=batch.positions,
        use_cache=False,
    )
    logits: Tensor = model.lm_head(output.last_hidden_state[batch.labels != packing.NO_LABEL])
    return logits


def _labelled(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, kinds and slots at the labelled positions, each (labels,)."""
    where = batch.labels != packing.NO_LABEL
    return batch.labels[where], batch.kinds[where], batch.slots[where]


def _is_location(labels: Tensor) -> Tensor:
    last = vocab.FIRST_LOCATION + vocab.LOCATIONS
    return (labels >= vocab.FIRST_LOCATION) & (labels < last)


def _weights(labels: Tensor, kinds: Tensor, slots: Tensor) -> Tensor:
    """Importance of every label, (labels,): words over locations over the trivial end token."""
    end = labels == vocab.EOS
    weight = torch.where(end, 0.1, torch.where(_is_location(labels), 1.0, 3.0))
    weight = torch.where((slots == 0) & ~end, 1.5 * weight, weight)
    weight = torch.where(kinds == packing.WORD, 0.4 * weight, weight)
    hard = torch.isin(kinds, torch.tensor(HARD)) & (slots < 2)
    return torch.where(hard, 2.0 * weight, weight)


def _by_kind(values: Tensor, kinds: Tensor) -> Iterator[tuple[str, float]]:
    for index, name in enumerate(KIND_NAMES):
        chosen = values[kinds == index]
        if len(chosen):
            yield name, float(chosen.mean())


def phases(model: LlavaForConditionalGeneration, recipe: Recipe) -> list[Phase]:
    """All phases in order."""
    language = [LanguagePhase(model, recipe, stage) for stage in recipe.stages]
    return [VisionPhase(model, recipe), *language]
