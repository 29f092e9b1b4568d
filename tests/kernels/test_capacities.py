"""Launches that are sized by capacities: what they select, where they put it, and that they serve any prompt."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from capacities import fillers_last, within
from cases import ScoreCase, ScoreShape, make_rows_long, num_compiled, same, split
from hypothesis import given
from hypothesis import strategies as st
from tensors import NEGATIVE_NAN, padded

from reroute_kernels import SelectMetadata, SelectRows, reference

KERNEL = "select"
pytestmark = pytest.mark.usefixtures("seeded")
SPECIAL = torch.tensor([0.0, -0.0, torch.nan, NEGATIVE_NAN, torch.inf, -torch.inf, 0.5, 0.5])


def decision(counts: list[int], keep: list[int], device: torch.device, *, texts: int = 3, gaps: int = 0) -> SelectRows:
    """A ragged batch with rows of nobody between samples."""
    parts = [split(n + texts + gaps, n, gaps=gaps) for n in counts]
    candidates, text_rows = (padded([part[i] for part in parts], device=device) for i in (0, 1))
    lengths = [n + texts + gaps for n in counts]
    starts = [2 + sum(lengths[:b]) + 5 * b for b in range(len(counts))]
    positions = torch.randperm(starts[-1] + lengths[-1] + 5).to(device)
    columns = starts, lengths, counts, [len(t) for _, t in parts], keep
    return SelectRows(candidates, text_rows, positions, SelectMetadata(*map(tuple, columns)))


def check(kernel: Any, counts: list[int], keep: list[int], device: torch.device, **sizes: int) -> None:
    """The kernel and the reference select what they do by exact counts, from scores with many ties."""
    rows = decision(counts, keep, device, **sizes)
    wide = within(rows)
    scores = SPECIAL[torch.randint(len(SPECIAL), wide.candidates.shape)].to(device)
    wanted = fillers_last(reference.select(scores[:, : rows.candidates.shape[1]], rows), rows, wide)
    same(reference.select(scores, wide), wanted)
    same(kernel.select(scores, wide), wanted)


@pytest.mark.parametrize("long", [False, True])
def test_ragged(kernel: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch, long: bool) -> None:
    """One program and several chunks; nothing, all and none kept; samples without candidates, in the midst too."""
    if long:
        make_rows_long(kernel, monkeypatch, 8)
    check(kernel, [300, 0, 3, 129], [100, 0, 3, 0], device, texts=40, gaps=2)
    check(kernel, [0, 5], [0, 5], device, texts=1)


@given(st.data())
def test_any_ragged_batch(kernel: Any, device: torch.device, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=3))
    keep = [data.draw(st.integers(0, n)) for n in counts]
    torch.manual_seed(data.draw(st.integers(0, 99)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "BLOCK_N", 16)
        patch.setattr(kernel, "CHUNK", 16)
        patch.setattr(kernel, "MAX_ONE_PROGRAM", data.draw(st.sampled_from([0, 4096])))
        patch.setattr(kernel, "MAX_BUCKET_KEYS", 8)
        texts, gaps = data.draw(st.integers(1, 20)), data.draw(st.integers(0, 5))
        check(kernel, counts, keep, device, texts=texts, gaps=gaps)


def test_one_launch_serves_other_counts(executor: Any, kernel: Any, device: torch.device) -> None:
    """Same lists, same arguments, same memory; only what the tensors hold is another prompt."""
    first, second = (within(decision(*batch, device)) for batch in (([40, 9], [13, 0]), ([9, 40], [9, 2])))
    counts = first.metadata.counts(device).clone()
    # Samples of the two start elsewhere too, which is read on the device.
    most = (0, 60), (60, 60), (43, 43), (6, 6), (43, 43)
    shared = SelectMetadata(*most, on_device=counts, static_length=50)
    for batch in (first, second):
        counts.copy_(batch.metadata.counts(device))
        lists = batch._replace(metadata=shared)
        scores = torch.randn(batch.candidates.shape, device=device)
        same(kernel.select(scores, lists), reference.select(scores, lists))


def test_scores_do_not_depend_on_capacities(device: torch.device, executor: Any) -> None:
    """To the bit; nor does it matter what lies beyond a sample's keys."""
    score = import_module("reroute_kernels.triton_kernels.score")
    inputs = ScoreCase([130, 70, 5], [100, 60, 0], [30, 7, 0], ScoreShape(6), poison=torch.nan).inputs(device)
    wide = within(inputs.rows)
    got, exact = score.score_topk(*inputs._replace(rows=wide)), score.score_topk(*inputs)
    same(got, fillers_last(exact, inputs.rows, wide))
    of_reference = reference.score_topk(*inputs._replace(rows=wide))
    assert torch.allclose(got.scores, of_reference.scores, rtol=3e-5, atol=1e-9)
    same(reference.select(of_reference.scores, wide), of_reference)


def test_diverse_selections_do_not_depend_on_capacities(device: torch.device, executor: Any) -> None:
    diverse = import_module("reroute_kernels.triton_kernels.diverse")
    rows = decision([40, 9, 3], [15, 0, 3], device, gaps=2)
    states = torch.full((rows.positions.shape[0], 32), torch.nan, device=device)
    for b, start in enumerate(rows.metadata.starts):
        own = rows.candidates[b, : rows.metadata.num_candidates[b]] + start
        states[own] = torch.randn(len(own), 32, device=device)
    wide = within(rows)
    same(diverse.diverse_topk(states, wide), fillers_last(diverse.diverse_topk(states, rows), rows, wide))


def test_a_class_compiles_once(executor: Any, kernel: Any, device: torch.device) -> None:
    check(kernel, [130], [40], device)
    before = num_compiled(executor, kernel._select_kernel)
    check(kernel, [160, 144], [32, 16], device, texts=16)
    assert num_compiled(executor, kernel._select_kernel) == before


def test_capacities_without_counts_are_refused(kernel: Any, device: torch.device) -> None:
    row = torch.arange(9, device=device)[None]
    rows = SelectRows(row[:, :5], row[:, 5:], row[0], SelectMetadata((0,), (9,), (5,), (4,), (2,), static_length=6))
    for select in (kernel.select, reference.select):
        with pytest.raises(ValueError, match="pass its counts as on_device"):
            select(torch.randn(1, 5, device=device), rows)
