"""Training of the vision tower on patch labels: which class, colour and box lie in each patch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from reroute.demo.tinyvlm import vocabulary as vocab
from reroute.demo.tinyvlm.boxes import to_bins
from reroute.demo.tinyvlm.digits import Split
from reroute.demo.tinyvlm.scenes import GRID, PATCHES, VISIBLE, Scene, coverage

from . import initialise
from .initialise import Pairs, WordSpace
from .packing import Ints, Mix, draw_scene, pixels_of
from .phase import Phase, generator, patch_features
from .recipe import PatchLabels, Recipe

NO_CLASS: Final = len(vocab.DIGITS)  # labels of the background
NO_COLOUR: Final = len(vocab.COLOURS)
MIX: Final = Mix(paired=0.0)


@dataclass(frozen=True)
class PatchBatch:
    """B scenes, and what lies in their patches."""

    pixels: Tensor  # float32 (B, 3, 96, 96), normalised to [-1, 1]
    label: Tensor  # int64 (B, PATCHES)
    colour: Tensor  # int64 (B, PATCHES)
    bins: Tensor  # int64 (B, PATCHES, 4)
    texture: Tensor  # int64 (B,)


def patch_labels(scene: Scene) -> tuple[Ints, Ints, Ints]:
    """Class (PATCHES,), colour (PATCHES,) and box bins (PATCHES, 4) of the digit on each patch."""
    label = np.full((GRID, GRID), NO_CLASS)
    colour = np.full((GRID, GRID), NO_COLOUR)
    bins = np.zeros((GRID, GRID, 4), np.int64)
    best = np.full((GRID, GRID), VISIBLE, np.float32)
    for digit in scene.digits:
        share = coverage(digit.box)
        wins = share > best
        best[wins], label[wins], colour[wins] = share[wins], digit.label, digit.colour
        bins[wins] = to_bins(digit.box)
    return label.ravel(), colour.ravel(), bins.reshape(PATCHES, 4)


def make_patch_batch(rng: np.random.Generator, size: int, split: Split) -> PatchBatch:
    """Draw scenes; everything follows from the generator's state."""
    drawn = [draw_scene(rng, split, MIX)[0] for _ in range(size)]
    patches = [patch_labels(scene) for scene in drawn]
    label, colour, bins = (torch.from_numpy(np.stack(p)) for p in zip(*patches, strict=True))
    return PatchBatch(pixels_of(drawn), label, colour, bins, torch.tensor([scene.texture for scene in drawn]))


class LabelTower(Phase):
    """Dense patch labels; stands in for the pre-training of a CLIP tower, frozen afterwards."""

    def __init__(self, model: LlavaForConditionalGeneration, recipe: Recipe, vision: PatchLabels) -> None:
        """Train `model`'s tower."""
        self.name, self.steps, self.rate = "vision", vision.steps, vision.rate
        self.model, self.recipe, self.batch = model, recipe, vision.batch
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
        return f"{self.steps} {self.batch} {self.rate}"

    def _predict(self, batch: PatchBatch) -> tuple[Tensor, ...]:
        """Logits of class, colour, box and texture of every patch, each (B * PATCHES, n)."""
        logits: Tensor = self.modules["patch_head"](patch_features(self.model, batch.pixels)).flatten(0, 1)
        return torch.split(logits, self.sizes, dim=1)

    def loss(self, rng: np.random.Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        """Cross entropies of a patch's class, colour, box bins and texture."""
        batch = make_patch_batch(rng, self.batch, "train")
        label, colour, box, texture = self._predict(batch)
        gold = batch.label.flatten()
        digit = gold < NO_CLASS
        bins = batch.bins.flatten(0, 1)[digit].flatten()
        loss = (
            F.cross_entropy(label, gold)
            + F.cross_entropy(label[digit], gold[digit])  # background patches outnumber digits
            + F.cross_entropy(colour, batch.colour.flatten())
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
            batch = make_patch_batch(generator(self.recipe, "validation", index), self.batch, "validation")
            label, colour, _, _ = self._predict(batch)
            gold, shade = batch.label.flatten(), batch.colour.flatten()
            digit = gold < NO_CLASS
            right[0] += (label.argmax(1) == gold)[digit].sum()
            right[1] += (colour.argmax(1) == shade)[digit].sum()
            total += int(digit.sum())
        return {"class": float(right[0]) / total, "colour": float(right[1]) / total}

    def finish(self) -> None:
        """Give the language model its starting point, which needs the trained tower."""
        random = torch.Generator().manual_seed(self.recipe.seed)
        initialise.mimetic(self.model, random)
        initialise.align_projector(self.model, self._described, random)

    def _described(self, index: int, space: WordSpace) -> Pairs:
        """Every patch with the words for its digit, or for the texture."""
        batch = make_patch_batch(generator(self.recipe, "projector", index), 24, "train")
        label, colour = batch.label.flatten(), batch.colour.flatten()
        digit = space.words(vocab.DIGITS, label) + space.words(vocab.COLOURS, colour)
        digit = space.placed(digit, batch.bins.flatten(0, 1))
        texture = space.words(vocab.TEXTURES, batch.texture.repeat_interleave(PATCHES))
        on_digit = (label < NO_CLASS)[:, None]
        weight = torch.where(on_digit, 10.0, 1.0)
        return patch_features(self.model, batch.pixels).flatten(0, 1), torch.where(on_digit, digit, texture), weight
