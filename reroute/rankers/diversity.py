"""Tokens that are unlike each other: a choice that no question is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from reroute_kernels import Backend, Selection

from .base import RankContext, Ranker

if TYPE_CHECKING:
    from ..core.cost import ModelShape

__all__ = ["Diversity"]


@dataclass(frozen=True)
class Diversity(Ranker):
    """Each pick is the candidate least like those before it, by the cosine of hidden states; a kernel of its own.

    The first pick is the one least like the mean. Picks are made in rounds of k // 8, at least 1
    (``reroute_kernels.diverse_topk``). All images of a prompt compete in one choice.
    """

    needs_attention: ClassVar[bool] = False

    def within_capacities(self, backend: Backend) -> bool:
        """See ``Ranker``."""
        return backend.name == "triton"

    def select(self, context: RankContext) -> Selection:
        """See ``Ranker``."""
        return context.backend.diverse_topk(context.hidden(), context.rows)

    def flops(self, shape: ModelShape, rows: int, candidates: int, k: int) -> int:
        """The cosine of each candidate with each pick, and with the mean."""
        return 2 * candidates * shape.hidden * (k + 1)
