"""The phases of a recipe, and what one optimiser step of the language model computes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from reroute.demo.tinyvlm import vocabulary as vocab
from reroute.demo.tinyvlm.scenes import PATCHES

from . import packing
from .label_tower import LabelTower
from .packing import KIND_NAMES, Batch, Mix, make_batch
from .phase import Phase, generator, patch_features
from .recipe import PatchLabels, Recipe, Stage
from .text_tower import TextTower

# Kinds whose answer needs two steps of thought: their first answer tokens weigh double.
HARD: Final = tuple(
    index for index, name in enumerate(KIND_NAMES) if name in ("hop", "hopext", "hint", "hopcls", "riddle", "riddlecol")
)


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
        features = patch_features(model, batch.pixels)
    visual = model.model.multi_modal_projector(features)
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
    vision = recipe.vision
    tower = LabelTower(model, recipe, vision) if isinstance(vision, PatchLabels) else TextTower(model, recipe, vision)
    return [tower, *(LanguagePhase(model, recipe, stage) for stage in recipe.stages)]
