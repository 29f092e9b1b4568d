"""Random scores: the chance baseline that any ranking has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..checks import shown, whole
from ..errors import RerouteError
from .scores import RankInputs, ScoreRanker

__all__ = ["RandomScores"]


@dataclass(frozen=True)
class RandomScores(ScoreRanker):
    """The scores depend on ``seed``, on the stage and on the number of candidates, on nothing else.

    So a sample is treated alike alone, in any batch and on any device. Average over seeds.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        """Check the type."""
        try:
            object.__setattr__(self, "seed", whole(self.seed))
        except TypeError:
            raise RerouteError(f"A seed is a whole number, such as seed=1, not {shown(self.seed)}.") from None

    def scores(self, inputs: RankInputs) -> list[torch.Tensor]:
        """See ``ScoreRanker``."""
        return [self._draw(inputs.stage, len(x), x.device) for x in inputs.hidden]

    def _draw(self, stage: int, n: int, device: torch.device) -> torch.Tensor:
        """On the host, where a seed means the same for any device, and pinned, so that the copy does not wait."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + stage) % (1 << 64))
        drawn = torch.rand(n, generator=generator, device="cpu", pin_memory=device.type == "cuda")
        return drawn.to(device, non_blocking=True)
