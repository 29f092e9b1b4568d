"""What a prefill decided, for people to look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch

__all__ = ["StageTrace", "Trace"]


@dataclass(frozen=True)
class StageTrace:
    """One decision. Index ``b`` of each tuple is sample ``b`` of the batch.

    - ``layer``: the routing layer: the first layer that runs on the result.
    - ``kept[b]`` (K,): indices into the sample's visual tokens, ascending.
    - ``candidates[b]`` (N,): the visual tokens that competed, ascending (``route``: all of them).
    - ``scores[b]`` (N,) fp32: the score of each candidate.
    """

    layer: int
    kept: tuple[torch.Tensor, ...]
    candidates: tuple[torch.Tensor, ...]
    scores: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Trace(Sequence[StageTrace]):
    """The decisions of one prefill, first stage first.

    ``visual[b]`` (N,): logical positions of sample ``b``'s visual tokens in this call's prompt.
    """

    stages: tuple[StageTrace, ...]
    visual: tuple[torch.Tensor, ...]

    @overload
    def __getitem__(self, index: int) -> StageTrace: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[StageTrace, ...]: ...

    def __getitem__(self, index: int | slice) -> StageTrace | tuple[StageTrace, ...]:
        """The decision(s) at ``index``."""
        return self.stages[index]

    def __len__(self) -> int:
        """Number of decisions."""
        return len(self.stages)

    def __iter__(self) -> Iterator[StageTrace]:
        """The decisions in order."""
        return iter(self.stages)
