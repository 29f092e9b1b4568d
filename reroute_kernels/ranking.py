"""The order in which candidates are taken: by score, with its ties and NaN; and by diversity, in rounds of picks."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["diversity_scores", "most_rounds", "picks_per_round", "ranked", "top"]


def ranked(scores: Tensor) -> Tensor:
    """Indices of scores (..., N) from the best to the worst: the higher first, then the lower index.

    -0.0 equals +0.0, and a NaN of any sign ranks above everything.
    """
    # Equal scores as equal bits, and one NaN for all: sorting on a device may look at bits.
    keys = (scores + 0.0).masked_fill_(scores.isnan(), torch.nan)
    return torch.sort(keys, stable=True, descending=True).indices


def top(scores: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` best of scores (N,), as ``ranked``."""
    return ranked(scores)[:k]


def picks_per_round(k: int) -> tuple[int, ...]:
    """How many candidates each round of a diverse selection of ``k`` picks: one, then an eighth of ``k`` at a time.

    From k = 16 on these are 9 to 12 rounds.
    """
    size = max(1, k // 8)
    return tuple(min(size if first else 1, k - first) for first in (0, *range(1, k, size)) if first < k)


def most_rounds(k: int) -> int:
    """The most rounds that a diverse selection of up to ``k`` has: those of 15 are more than those of any larger k."""
    return min(k, 15)


def diversity_scores(states: Tensor, k: int) -> Tensor:
    """Scores (N,) fp32 by which ``k`` of N rows are taken so that each is unlike those taken before.

    With v = x / |x| in fp32, and v = 0 for x = 0: the first pick lies farthest from the mean of all v. Each round then
    picks the rows whose highest similarity v . v' to a pick so far, but at least 0, is the lowest. A tie goes to the
    lower index.

    A row's score is 1 if it is the first pick. Else it is that similarity, negated, when the row was picked, and for a
    row that was not when the last round was. So the ``top`` ``k`` of the scores are the picks. If a row holds a NaN,
    or its squares overflow, all scores are NaN.

    Args:
        states: (N, C) of any floating dtype.
        k: at most N. Nothing is compared for k = 0, and all scores are 0.
    """
    n = states.shape[0]
    scores = torch.zeros(n, dtype=torch.float32, device=states.device)
    if k == 0:
        return scores
    x = states.float()
    square = x.square().sum(1)
    # Times zero, so that an overflow is NaN and not a row of zeros.
    inverse_norm = torch.where(square == 0, 0.0, (square * 0 + 1) / square.sqrt())
    v = x * inverse_norm[:, None]
    # |v - mean|^2 is |mean|^2 + 1 - 2 v . mean, without the 1 for a zero row: so v . sum orders unit rows, and a zero
    # row lies where half of N does.
    centrality = v @ v.sum(0) + (square == 0) * (n / 2)
    scores += centrality.abs() * 0
    picked = torch.zeros_like(scores, dtype=torch.bool)
    picks = top(-centrality, 1)
    scores = scores.index_add(0, picks, torch.ones_like(scores[:1]))
    for count in picks_per_round(k)[1:]:
        picked = picked.index_fill(0, picks, True)
        similarity = (v @ v.index_select(0, picks).T).amax(1)
        scores = torch.where(picked, scores, torch.minimum(scores, 0.0 - similarity))
        picks = top(scores.masked_fill(picked, -torch.inf), count)
    return scores
