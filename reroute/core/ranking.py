"""What a decision needs of the model, and what a ranker gets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from reroute_kernels import Backend, RMSNorm, Rope, Selection, SelectMetadata

from .decision import Decision

__all__ = ["DecoderAdapter", "RankContext", "Ranker"]


class DecoderAdapter(Protocol):
    """What scoring needs from the model."""

    rope: Rope

    def input_norm(self, layer: int) -> RMSNorm | None:
        """The norm of rows before the attention of ``layer``, or None if there is more to it than its formula."""

    def normalise(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` (R, C) after that norm, by the model itself."""

    def project(self, layer: int, normed: torch.Tensor, query_rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries (B, H, D) of ``normed[query_rows]`` and keys (R, G, D) of ``normed`` (R, C), both before RoPE.

        Queries come after the layer's query norm, keys before its key norm.
        """

    def key_norm(self, layer: int) -> RMSNorm | None:
        """The norm of each key head of ``layer``, if it has one."""

    def scale(self, layer: int) -> float:
        """Factor on the attention logits of ``layer``."""

    def rope_tables(self, hidden: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin (B, S, rot) at position ids (B, S)."""


@dataclass(frozen=True)
class RankContext:
    """What a ranker may use at one decision. Hidden states are computed only if it asks for them, once.

    - ``metadata``, ``candidates``, ``text_rows``, ``positions``: as ``Backend.select`` takes them, R scored rows.
    - ``query_rows`` (B,): the last prompt token of each sample among the scored rows.
    - ``cos``, ``sin`` (R, rot): RoPE tables of the scored rows.
    - ``hidden()`` (R, C): latest hidden states of the scored rows, on the device of the index tensors.
    - ``normed()`` (R, C): the same after the input norm of ``decision.score_layer``, on the device of that layer.
    """

    decision: Decision
    backend: Backend
    adapter: DecoderAdapter
    metadata: SelectMetadata
    candidates: torch.Tensor
    text_rows: torch.Tensor
    positions: torch.Tensor
    query_rows: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    hidden: Callable[[], torch.Tensor]
    normed: Callable[[], torch.Tensor]


class Ranker(ABC):
    """What orders the candidates of a decision; one object serves all decisions, samples and threads."""

    scores_attention: ClassVar[bool] = False
    """Whether it computes attention scores, whose FLOPs are known and counted."""

    @abstractmethod
    def select(self, context: RankContext) -> Selection:
        """The ``decision.k`` best candidates of each sample. Asks for ``hidden`` or ``normed`` of ``context``, once.

        Must not wait for the device, and must not let a sample depend on its batch neighbours.
        """
