"""Kept tokens take up others: what rankers that merge share."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from .vision import Vision

__all__ = ["WEIGHTS", "absorb", "nearest", "projector_inputs"]

WEIGHTS = 1 << 24
"""Weights of pairs of tokens that are held at once."""


def projector_inputs(vision: Vision) -> list[torch.Tensor]:
    """What the projector reads of each sample's tokens, (N_b, F)."""
    features = [vision.states(index) for index in vision.shape.features]
    return [torch.cat(its, -1) for its in zip(*features, strict=True)]


def nearest(compared: torch.Tensor, receivers: torch.Tensor) -> torch.Tensor:
    """Which of the ``receivers`` (K,) each of ``compared`` (N, F) is most like, by cosines in their dtype: (N,) int64.

    Places among the receivers; of equally like ones the first.
    """
    unit = normalize(compared, dim=-1)
    theirs = unit.index_select(0, receivers)
    blocks = unit.split(max(1, WEIGHTS // max(1, len(receivers))))
    return torch.cat([(block @ theirs.T).argmax(1) for block in blocks])


def absorb(
    source: torch.Tensor, receivers: torch.Tensor, takes: torch.Tensor, *, averages: bool = False
) -> torch.Tensor:
    """What the ``receivers`` (K,) make of ``source`` (N, F) when they take up others: (K, F).

    Each adds the mean of those that it takes up to itself, or ``averages`` itself and them.

    Args:
        source: states of all tokens.
        receivers: their places.
        takes: (N,) int64, which receiver takes up each token, as a place among them; -1: none.
        averages: see above.
    """
    places, numbers = (torch.arange(len(x), device=source.device) for x in (source, receivers))
    blocks = (x.split(max(1, WEIGHTS // max(1, len(source)))) for x in (numbers, receivers))
    parts = []
    for number, receiver in zip(*blocks, strict=True):
        taken, itself = takes == number[:, None], places == receiver[:, None]
        count = taken.sum(1, keepdim=True)
        weights = (taken | itself) / (count + 1) if averages else taken / count.clamp(min=1) + itself
        parts.append(weights.to(source.dtype) @ source)
    return torch.cat(parts)
