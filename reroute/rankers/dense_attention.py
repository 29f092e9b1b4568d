"""What the plain model attends to, recorded ahead: the ranking of an oracle."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from reroute_kernels import Selection

from ..errors import RerouteError
from .attention import LastTokenAttention
from .base import RankContext, Ranker

if TYPE_CHECKING:
    from ..core.cost import ModelShape

__all__ = ["AttentionRecorder", "DenseAttention", "RecordedAttention"]


@dataclass(frozen=True, eq=False)
class DenseAttention:
    """The attention that the last prompt token pays each visual token where nothing is deferred.

    ``scores[b]`` (layers, N_b) fp32, mean over heads, of each sample of a call. ``reroute.record_attention`` makes it.
    """

    scores: tuple[torch.Tensor, ...]

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return len(self.scores[0])

    @property
    def counts(self) -> tuple[int, ...]:
        """Visual tokens N of each sample."""
        return tuple(scores.shape[1] for scores in self.scores)


class AttentionRecorder(Ranker):
    """Records, and keeps nothing: to be asked before the last layer, once. ``record`` is None until then."""

    record: DenseAttention | None = None

    def looks_before(self, layer: int) -> Collection[int]:
        """See ``Ranker``: every layer's, its own included."""
        return range(layer + 1)

    def note(self, context: RankContext) -> list[torch.Tensor]:
        """The scores (N_b,) of each sample."""
        scores = LastTokenAttention().select(context).scores
        return [row[:n] for row, n in zip(scores, context.decision.candidates, strict=True)]

    def select(self, context: RankContext) -> Selection:
        """See ``Ranker``."""
        layers = (context.notes[layer] for layer in sorted(context.notes))
        self.record = DenseAttention(tuple(torch.stack(its) for its in zip(*layers, strict=True)))
        return context.best(scores[0] for scores in self.record.scores)


@dataclass(frozen=True)
class RecordedAttention(Ranker):
    """Score of a candidate: the mean of what was recorded in layers ``first`` up to, and without, ``last``.

    It serves calls with the prompts that were recorded, in their order. By their numbers of visual tokens it notices
    others; that these are the same prompts is up to the caller, as the host does not see what is in them.
    """

    needs_attention: ClassVar[bool] = False
    record: DenseAttention
    first: int
    last: int

    def select(self, context: RankContext) -> Selection:
        """See ``Ranker``.

        Raises:
            RerouteError: other prompts were recorded.
        """
        decision, recorded = context.decision, self.record.counts
        is_same = decision.candidates == recorded if decision.from_pool else len(decision.candidates) == len(recorded)
        if not is_same:
            raise RerouteError(
                f"Attention was recorded for prompts of {recorded} visual tokens, and here {decision.candidates} of "
                "them compete. Record it for these prompts, in one call as they come here."
            )
        device = context.visual_indices.device
        means = (scores[self.first : self.last].mean(0).to(device) for scores in self.record.scores)
        samples = zip(means, context.visual_indices, decision.candidates, strict=True)
        return context.best(mean.index_select(0, indices[:n]) for mean, indices, n in samples)

    def flops(self, shape: ModelShape, rows: int, candidates: int, k: int) -> int:
        """0: the plain prefill that has to run before is no part of this one."""
        return 0
