"""Diverse selection of the reference: against a loop, and what it promises of its scores."""

from __future__ import annotations

import math

import pytest
import torch
from diversity import check_picks, rows_of_exact_cosines
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import padded
from torch import Tensor

from reroute_kernels import SelectMetadata, SelectRows
from reroute_kernels.ranking import diversity_scores, most_rounds, picks_per_round, top
from reroute_kernels.reference import diverse_topk, select

INF, NAN = math.inf, math.nan


def loop(states: Tensor, k: int) -> tuple[list[int], list[float]]:
    """Picks in their order, and scores, in fp64 and word for word; ``states`` have exact cosines."""
    x = states.double()
    v = torch.where(x.norm(dim=1, keepdim=True) > 0, x / x.norm(dim=1, keepdim=True), 0.0)
    near, scores, picks = [0.0] * len(v), [0.0] * len(v), list[int]()
    size = max(1, k // 8)
    while len(picks) < k:
        rest = [i for i in range(len(v)) if i not in picks]
        if not picks:
            # Times N, so that it has no rounding either.
            squares = ((len(v) * v - v.sum(0)) ** 2).sum(1).tolist()
            chosen = [max(rest, key=lambda i: (squares[i], -i))]
        else:
            for i in rest:
                near[i] = max(near[i], *(max(0.0, float(v[i] @ v[j])) for j in picks))
                scores[i] = -near[i]
            chosen = sorted(rest, key=lambda i: (near[i], i))[: min(size, k - len(picks))]
        scores[chosen[0]] += not picks
        picks += chosen
    return picks, [score + 0.0 for score in scores]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_against_a_loop(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    n = data.draw(st.integers(0, 40))
    k = data.draw(st.integers(0, n))
    states = rows_of_exact_cosines(n)
    picks, scores = loop(states, k)
    got = diversity_scores(states, k)
    assert got.tolist() == scores
    assert sorted(top(got, k).tolist()) == sorted(picks)


@pytest.mark.parametrize(
    ("k", "counts"),
    [
        (0, ()),
        (1, (1,)),
        (3, (1, 1, 1)),
        (15, (1,) * 15),
        (16, (1, 2, 2, 2, 2, 2, 2, 2, 1)),
        (64, (1, 8, 8, 8, 8, 8, 8, 8, 7)),
        (192, (1, *(24,) * 7, 23)),
    ],
)
def test_rounds(k: int, counts: tuple[int, ...]) -> None:
    assert picks_per_round(k) == counts


def test_rounds_add_up() -> None:
    for k in range(1, 300):
        assert sum(picks_per_round(k)) == k
        assert min(picks_per_round(k)) > 0
        assert most_rounds(k) == max(len(picks_per_round(fewer)) for fewer in range(k + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 5, 40, 100])
def test_rows_of_any_cosines(k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(k)
    states = (torch.randn(100, 24) + 2).to(dtype)
    check_picks(states, k, diversity_scores(states, k), tolerance=1e-6)


def test_a_zero_row_lies_between() -> None:
    """It is farther from the mean of all than a row along it, and nearer than a row across."""
    along, across, zero = [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]
    assert top(diversity_scores(torch.tensor([along, along, zero]), 1), 1).tolist() == [2]
    assert top(diversity_scores(torch.tensor([zero, across, along, along]), 1), 1).tolist() == [1]
    assert diversity_scores(torch.tensor([along, zero, across, along]), 4).tolist() == [0, 0, 1, -1]
    assert diversity_scores(torch.zeros(3, 2), 2).tolist() == [1, 0, 0]


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e30])
@pytest.mark.parametrize("row", [0, 5])
def test_a_broken_row_shows(value: float, row: int) -> None:
    states = torch.randn(9, 4)
    states[3] = 0
    states[row, 2] = value
    scores = diversity_scores(states, 4)
    assert scores.isnan().all()
    assert top(scores, 4).tolist() == [0, 1, 2, 3]


def test_a_batch() -> None:
    """Each sample has rows, N and k of its own, and equals the sample alone to the bit; nothing else is read."""
    torch.manual_seed(0)
    counts, texts, k = (30, 0, 7, 90), (3, 5, 0, 2), (10, 0, 7, 40)
    starts = (2, 40, 50, 60)
    states = torch.full((170, 24), NAN)
    candidates, text_rows = [], []
    for start, n, m in zip(starts, counts, texts, strict=True):
        order = torch.randperm(n + m)
        candidates.append(order[:n].sort().values)
        text_rows.append(order[n:].sort().values)
        states[start + candidates[-1]] = torch.randn(n, 24)
    metadata = SelectMetadata(starts, tuple(n + m for n, m in zip(counts, texts, strict=True)), counts, texts, k)
    rows = SelectRows(padded(candidates, width=99), padded(text_rows), torch.arange(170), metadata)
    got = diverse_topk(states, rows)
    for part, expected in zip(got, select(got.scores, rows), strict=True):
        assert torch.equal(part, expected)
    for b, n in enumerate(counts):
        assert torch.equal(got.scores[b, :n], diversity_scores(states[starts[b] + candidates[b]], k[b]))
        assert (got.scores[b, n:] == -INF).all()
