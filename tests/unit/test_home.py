"""Both homes hold the same rows; of one of them autograd knows where they came from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reroute import Schedule
from reroute.core.home import Home, PooledHome, RecordedHome
from reroute.core.plan import Plan, make_plan
from reroute_kernels import PagedPool, RMSNorm, resolve

BACKEND = resolve("torch", torch.device("cpu"))
TEXT, VISUAL = 0, 1


def plan_of(lengths: list[int], *, left: bool) -> Plan:
    """Prompts of one visual token and some text, padded on one side."""
    ids = np.zeros((len(lengths), max(lengths)), dtype=np.int64)
    valid = np.zeros(ids.shape, dtype=bool)
    for b, length in enumerate(lengths):
        start = ids.shape[1] - length if left else 0
        ids[b, start], valid[b, start : start + length] = VISUAL, True
    plan = make_plan(ids, valid, [VISUAL], Schedule((0,), (1.0,)), "route")
    assert plan is not None
    return plan


def homes(plan: Plan, dtype: torch.dtype = torch.float32) -> tuple[PooledHome, RecordedHome]:
    pool = PagedPool(4, dtype, "cpu", page_size=3)
    like = torch.empty(plan.batch, plan.length, 4, dtype=dtype)
    return PooledHome(plan, BACKEND, pool), RecordedHome(plan, BACKEND, like, torch.device("cpu"))


def rows_of(home: Home, places: list[list[int]]) -> Tensor:
    """Rows (B, S) of these sample rows, -1 for fillers."""
    index = torch.tensor(places, dtype=torch.int64)
    return (index + home.tensors.starts[:, None]).masked_fill(index < 0, -1)


@settings(max_examples=60)
@given(st.data())
def test_the_same_rows(data: Any) -> None:
    """Whatever was deferred, NaN in fillers included, comes back the same, with the tables that belong to it."""
    lengths = data.draw(st.lists(st.integers(2, 7), min_size=1, max_size=3))
    plan = plan_of(lengths, left=data.draw(st.booleans()))
    pair = homes(plan)
    first = torch.randn(plan.batch, plan.length, 4)
    first[torch.as_tensor(plan.order < 0)] = torch.nan
    for home in pair:
        home.defer(home.tensors.rows, first)
    for _ in range(data.draw(st.integers(1, 3))):
        chosen = [data.draw(st.sets(st.integers(0, n - 1))) for n in lengths]
        width = max(1, max(map(len, chosen)) + data.draw(st.integers(0, 1)))
        places = [[-1] * (width - len(rows)) + sorted(rows) for rows in chosen]
        taken = []
        for home in pair:
            rows = rows_of(home, places)
            taken.append(home.admit(rows, home.tensors.tokens[:, None] + 1))
            hidden, numbers = taken[-1]
            assert torch.equal(numbers[..., 0] > 0, rows >= 0)
            assert not hidden[rows < 0].any()
        for ours, theirs in zip(*taken, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
        new = torch.randn(plan.batch, width, 4).masked_fill((torch.tensor(places) < 0)[..., None], torch.nan)
        for home in pair:
            home.defer(rows_of(home, places), new)
    assert torch.equal(*(home.admit(home.tensors.rows)[0] for home in pair))
    for home in pair:
        home.close()


def test_norms_and_states() -> None:
    plan = plan_of([5, 2], left=True)
    pooled, recorded = homes(plan)
    hidden, norm = torch.randn(2, 5, 4, requires_grad=True), RMSNorm(torch.rand(4), 1e-6)
    results = []
    for home in (pooled, recorded):
        with torch.no_grad():
            normed = home.defer_rmsnorm(home.tensors.rows, home.tensors.inverse_index, hidden, norm)
        assert normed.shape == home.states().shape
        assert not normed.requires_grad
        assert home.states().requires_grad == home.is_recorded
        valid = home.tensors.rows[home.tensors.rows >= 0]
        results.append((normed[valid], home.states()[valid]))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert recorded.admit(recorded.tensors.rows)[0].requires_grad  # though it was deferred under no_grad
    assert not pooled.admit(pooled.tensors.rows)[0].requires_grad
    pooled.close()


@pytest.mark.parametrize("left", [True, False])
def test_gradients_of_moves(left: bool) -> None:
    """Two stages, of which one writes back what the other left, against finite differences."""
    plan = plan_of([5, 3], left=left)

    def moves(first: Tensor, scale: Tensor) -> Tensor:
        _, home = homes(plan, torch.float64)
        home.defer(home.tensors.rows, first)
        for places in ([[0, 2, 4], [-1, 0, 2]], [[1, 2], [-1, 2]]):
            rows = rows_of(home, places)
            home.defer(rows, home.admit(rows)[0].sin() * scale)
        return home.admit(home.tensors.rows)[0]

    first = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(moves, (first, scale))
