"""What every stretch of training has: a loss, a schedule, an optimiser, figures on validation images."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from .muon import Muon
from .recipe import Recipe


def generator(recipe: Recipe, name: str, step: int) -> np.random.Generator:
    """The source of all of one step's randomness: depends on seed, stage name and step alone."""
    return np.random.default_rng([recipe.seed, zlib.crc32(name.encode()), step])


def patch_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """What the tower makes of every patch, (B, PATCHES, C)."""
    hidden: Tensor = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    return hidden[:, 1:]


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

    def begin(self) -> None:  # noqa: B027 - most phases have nothing to do
        """Called once before the first step."""

    def finish(self) -> None:  # noqa: B027 - most phases have nothing to do
        """Called once after the last step."""

    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained."""
        return list(self.modules.parameters())

    def optimisers(self) -> list[torch.optim.Optimizer]:
        """Muon for the matrices, AdamW at half the rate for embeddings, read-outs, biases and the rest."""
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.modules.named_parameters():
            lookup = "embed" in name or "patch_head" in name or "readout" in name
            (others if parameter.ndim != 2 or lookup else matrices).append(parameter)
        adam = torch.optim.AdamW(others, lr=self.rate / 2, betas=(0.9, 0.98), weight_decay=0.0)
        return [Muon(matrices, lr=self.rate), adam]
