"""Rows to select from by diversity, and what a selection of any rows must fulfil."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from reroute_kernels.ranking import picks_per_round, top


def rows_of_exact_cosines(n: int, features: int = 16) -> Tensor:
    """(n, features) fp32, each row 0, 1, 4 or 16 times plus or minus a power of two, so few different ones.

    Their norms are powers of two and all cosines fractions of 16: sums of them have no rounding, so that many are equal
    whatever the order of summation. ``features``: at least 16.
    """
    signs = torch.randint(0, 2, (n, features)) * 2.0 - 1
    count = torch.tensor([0, 1, 4, 16])[torch.randint(0, 4, (n, 1))]
    chosen = torch.arange(features) < count
    moved = (torch.arange(features) + torch.randint(0, 3, (n, 1))) % features
    return (signs * chosen).gather(1, moved) * 2.0 ** torch.randint(-3, 4, (n, 1))


def check_picks(states: Tensor, k: int, scores: Tensor, tolerance: float) -> None:
    """By the definition, in fp64 and up to ``tolerance``: no row that was left was less alike when ``k`` were picked.

    ``states``: no two of these rows may be at an angle of 90 degrees or more, for scores tell in which round a row was
    picked only where they differ.
    """
    picks = top(scores, k)
    v = normalize(states.double(), dim=1)
    distance = (v - v.mean(0)).norm(dim=1)
    assert distance[picks[0]] >= distance.max() - tolerance
    assert scores[picks[0]] == 1
    taken, near = 1, torch.zeros_like(distance)
    for count in picks_per_round(k)[1:]:
        near = (v @ v[picks[:taken]].T).amax(1)
        assert near.min() > 0
        rest = torch.ones_like(near, dtype=torch.bool).index_fill(0, picks[:taken], False)
        chosen = picks[taken : taken + count]
        torch.testing.assert_close(-scores[chosen].double(), near[chosen], rtol=0, atol=tolerance)
        assert near[chosen].max() <= near[rest].sort().values[count - 1] + tolerance
        taken += count
    left = torch.ones_like(near, dtype=torch.bool).index_fill(0, picks, False)
    torch.testing.assert_close(-scores[left].double(), near[left], rtol=0, atol=tolerance)
