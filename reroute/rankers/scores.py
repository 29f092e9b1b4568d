"""A ranker that gives each candidate a number: the base of your own."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from reroute_kernels import Selection

from ..errors import RerouteError
from .base import RankContext, Ranker
from .vision import UNSEEN, Vision

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["RankInputs", "ScoreRanker"]


@dataclass(frozen=True)
class RankInputs:
    """What scores are computed from.

    - ``hidden[b]`` (N_b, C): latest hidden states of sample ``b``'s candidates, in prompt order.
    - ``query`` (B, C): hidden state of each sample's last prompt token.
    - ``layer``: the layer whose input this is. ``stage``: the stage that is decided, from 0.
    - ``visual_indices[b]`` (N_b,): which of the sample's visual tokens the candidates are.
    - ``vision``: the pictures, if the ranker needs them; its lists are of all visual tokens.
    """

    hidden: list[torch.Tensor]
    query: torch.Tensor
    layer: int
    stage: int
    visual_indices: list[torch.Tensor] = field(default_factory=list)
    vision: Vision = UNSEEN


class ScoreRanker(Ranker):
    """Ranks by numbers that ``scores`` returns; the selection is the exact kernel of all rankers::

    @dataclass(frozen=True)
    class Norm(ScoreRanker):
        def scores(self, inputs: RankInputs) -> list[torch.Tensor]:
            return [hidden.float().norm(dim=-1) for hidden in inputs.hidden]

    reroute.enable(model, method=FastV(ranker=Norm()), keep=0.33)
    """

    needs_attention: ClassVar[bool] = False

    @abstractmethod
    def scores(self, inputs: RankInputs) -> Sequence[torch.Tensor]:
        """Scores (N_b,) of each sample's candidates, the highest kept first. Other shapes are refused.

        Runs under ``torch.no_grad()``, as a selection has no gradient. Must not wait for the device, and must not let a
        sample depend on its batch neighbours.
        """

    def select(self, context: RankContext) -> Selection:
        """See ``Ranker``.

        Raises:
            RerouteError: ``scores`` did not return one number for each candidate.
        """
        return context.best(self.scores_of(context, context.hidden()))

    def scores_of(self, context: RankContext, states: torch.Tensor) -> list[torch.Tensor]:
        """Scores (N_b,) of each sample's candidates, for ``select`` and for rankers that build on scores.

        ``states`` are those of ``context.hidden()``, which may be asked for once.

        Raises:
            RerouteError: ``scores`` did not return one number for each candidate.
        """
        decision = context.decision
        hidden, query = context.candidates_of(states), states[context.tables.query_rows]
        indices = [row[: len(its)] for row, its in zip(context.visual_indices, hidden, strict=True)]
        inputs = RankInputs(hidden, query, decision.score_layer, decision.stage, indices, context.vision)
        return self._checked(inputs)

    def _checked(self, inputs: RankInputs) -> list[torch.Tensor]:
        """The scores, if they are one number per candidate: anything else might be broadcast. Never waits."""
        returned = self.scores(inputs)
        scores = [] if returned is None else list(returned)
        if len(scores) != len(inputs.hidden):
            raise RerouteError(
                f"{type(self).__name__} scored {len(scores)} samples instead of {len(inputs.hidden)}. Return one "
                "tensor for each of inputs.hidden."
            )
        for sample, (score, hidden) in enumerate(zip(scores, inputs.hidden, strict=True)):
            came = tuple(score.shape) if isinstance(score, torch.Tensor) else type(score).__name__
            if came != (len(hidden),):
                raise RerouteError(
                    f"{type(self).__name__} scored sample {sample} with {came} instead of ({len(hidden)},). "
                    "Return one number for each row of inputs.hidden[b]."
                )
        return scores
