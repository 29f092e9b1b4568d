"""Random: the chance baseline that any ranking has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import ScoreView
from .fastv import FastV

__all__ = ["Random"]


@dataclass(frozen=True)
class Random(FastV):
    """FastV's schedule with random scores.

    The scores depend on ``seed``, on the stage and on the number of candidates, on nothing else: a
    sample is treated alike alone, in any batch and on any device. Average over seeds.
    """

    name = "random"

    seed: int = 0

    def score(self, view: ScoreView) -> list[torch.Tensor]:
        """See ``Method``."""
        return [self._draw(view.stage, len(x), x.device) for x in view.hidden]

    def _draw(self, stage: int, n: int, device: torch.device) -> torch.Tensor:
        """On the host, where a seed means the same for any device, and pinned, so that the copy does not wait."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + stage)
        drawn = torch.rand(n, generator=generator, device="cpu", pin_memory=device.type == "cuda")
        return drawn.to(device, non_blocking=True)
