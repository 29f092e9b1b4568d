"""Every operation of the reference but the score."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import NEGATIVE_NAN, padded
from transformers.models.glm4v.modeling_glm4v import apply_rotary_pos_emb as glm_rope
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rope

from reroute_kernels import SelectMetadata, SelectRows
from reroute_kernels.reference import admit, defer, rotate, select

INF, NAN = math.inf, math.nan


# --- defer and admit ------------------------------------------------------------------------


@st.composite
def tables(draw: Any) -> tuple[int, list[int], list[list[int]], int]:
    """Page size, page table, ascending rows per sample (some empty) and S."""
    page = draw(st.integers(1, 4))
    table = draw(st.permutations(range(6)))[: draw(st.integers(0, 5))]
    owner = draw(st.lists(st.integers(0, 2), min_size=len(table), max_size=len(table)))
    batch = draw(st.integers(1, 3))
    rows: list[list[int]] = [[] for _ in range(batch)]
    for place, sample in enumerate(owner):
        taken = draw(st.sets(st.integers(place * page, place * page + page - 1)))
        rows[sample % batch] += sorted(taken)
    return page, table, rows, max(map(len, rows)) + draw(st.integers(0, 2))


@settings(max_examples=200, deadline=None)
@given(tables(), st.sampled_from(["left", "right"]))
def test_defer_and_admit_against_loops(case: Any, align: Any) -> None:
    page, table, rows, width = case
    index = padded(rows, width=width, align=align)
    pages = torch.randn(6, page, 3)
    hidden = torch.randn(len(rows), width, 3)
    expected = pages.clone()
    for b, sample in enumerate(index.tolist()):
        for s, row in enumerate(sample):
            if row >= 0:
                expected[table[row // page], row % page] = hidden[b, s]
    device_table = torch.tensor(table, dtype=torch.int64)
    defer(pages, device_table, index, hidden)
    assert torch.equal(pages, expected)  # every other row included

    companion = torch.arange(len(table) * page * 2).view(-1, 2)
    got, ids = admit(pages, device_table, index, companion)
    assert ids.dtype == torch.int64
    for b, sample in enumerate(index.tolist()):
        for s, row in enumerate(sample):
            assert torch.equal(got[b, s], hidden[b, s] if row >= 0 else torch.zeros(3))
            assert ids[b, s].tolist() == ([2 * row, 2 * row + 1] if row >= 0 else [0, 0])


@pytest.mark.parametrize("poison", [NAN, INF])
def test_fillers_are_inert_under_poison(poison: float) -> None:
    pages = torch.full((3, 2, 4), poison)
    rows = torch.tensor([[-1, 0, 2], [-1, -1, -1]])
    hidden = torch.ones(2, 3, 4)
    hidden[rows < 0] = poison
    defer(pages, torch.tensor([2, 0]), rows, hidden)
    written = pages.isfinite().all(-1).nonzero().tolist()
    assert written == [[0, 0], [2, 0]]
    got, cos = admit(pages, torch.tensor([2, 0]), rows, torch.full((4, 2), poison))
    assert torch.equal(got, torch.where(rows >= 0, 1.0, 0.0)[..., None].expand(2, 3, 4))
    assert torch.equal(cos[rows < 0], torch.zeros(4, 2))


def test_an_all_filler_batch_changes_nothing() -> None:
    pages = torch.randn(2, 2, 4)
    pages[0, 0] = NAN
    before = pages.clone()
    rows = torch.full((2, 3), -1)
    defer(pages, torch.tensor([1]), rows, torch.ones(2, 3, 4))
    defer(pages, torch.empty(0, dtype=torch.int64), rows, torch.ones(2, 3, 4))
    assert torch.equal(pages.view(torch.int32), before.view(torch.int32))


def test_pages_keep_no_autograd_history() -> None:
    pages = torch.zeros(1, 2, 4)
    defer(pages, torch.tensor([0]), torch.tensor([[0]]), torch.ones(1, 1, 4, requires_grad=True))
    assert not pages.requires_grad
    assert pages.sum() == 4


def test_fragmented_equals_contiguous() -> None:
    hidden = torch.randn(2, 7, 8)
    rows = torch.tensor([[-1, -1, 0, 1, 2, 3, 4], [8, 9, 10, 11, 12, 13, 14]])
    results = []
    for table in ([0, 1, 2, 3], [4, 1, 0, 3]):
        pages = torch.full((5, 4, 8), NAN)
        defer(pages, torch.tensor(table), rows, hidden)
        results.append(admit(pages, torch.tensor(table), rows)[0])
    assert torch.equal(*results)


def test_companions_of_any_dtype() -> None:
    aux = [torch.ones(4, 2, dtype=d) for d in (torch.bfloat16, torch.int64, torch.bool)]
    out = admit(torch.ones(2, 2, 4), torch.tensor([1, 0]), torch.tensor([[-1, 3]]), *aux)
    assert [t.dtype for t in out] == [torch.float32, torch.bfloat16, torch.int64, torch.bool]
    assert all(t[0].to(torch.int64).sum(-1).tolist() == [0, t.shape[-1]] for t in out)


# --- rotate ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rot", [8, 16])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotate_equals_transformers(layout: Any, rot: int, dtype: torch.dtype) -> None:
    x = torch.randn(1, 3, 5, 16, dtype=dtype)
    angles = torch.randn(1, 5, rot // 2)
    angles = angles.repeat_interleave(2, -1) if layout == "interleaved" else angles.repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    if layout == "interleaved":
        expected = glm_rope(x, x, cos, sin)[0]  # type: ignore[no-untyped-call]
    else:
        turned = llama_rope(x[..., :rot], x[..., :rot], cos, sin)[0]
        expected = torch.cat((turned, x[..., rot:]), dim=-1)
    got = rotate(x[0].transpose(0, 1), cos[0], sin[0], layout)
    assert got.dtype == dtype
    assert torch.equal(got, expected[0].transpose(0, 1))


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotate_of_nothing_and_in_the_dtype_of_x(layout: Any) -> None:
    x = torch.randn(5, 3, 16, dtype=torch.bfloat16)
    assert torch.equal(rotate(x, torch.empty(5, 0), torch.empty(5, 0), layout), x)
    assert rotate(x, torch.ones(5, 4), torch.ones(5, 4), layout).dtype == torch.bfloat16


def test_unknown_layout_lists_the_known() -> None:
    with pytest.raises(ValueError, match="'half', 'interleaved'"):
        rotate(torch.ones(1, 1, 2), torch.ones(1, 2), torch.ones(1, 2), "neox")  # type: ignore[arg-type]


# --- select ---------------------------------------------------------------------------------


def single(scores: list[float], keep: int) -> list[int]:
    """Kept candidates of one sample whose rows are all candidates."""
    n = len(scores)
    selection = select(
        torch.tensor([scores], dtype=torch.float32),
        SelectRows(
            torch.arange(n)[None],
            torch.empty(1, 0, dtype=torch.int64),
            torch.arange(n) + 7,
            SelectMetadata((0,), (n,), (n,), (0,), (keep,)),
        ),
    )
    assert torch.equal(selection.kept, selection.active_rows)
    assert torch.equal(selection.kept + 7, selection.active_positions)
    return selection.kept[0].tolist()


@pytest.mark.parametrize(
    ("scores", "keep", "kept"),
    [
        ([1, 3, 2], 2, [1, 2]),
        ([1, 1, 1, 1], 2, [0, 1]),
        ([0, 2, 1, 1, 1], 3, [1, 2, 3]),
        ([-0.0, 0.0, -0.0, 0.0], 2, [0, 1]),
        ([0.0, -0.0, 1.0], 2, [0, 2]),
        ([-1.0, -0.0, 0.0], 1, [1]),
        ([INF, NAN, 1], 1, [1]),
        ([INF, NAN, NEGATIVE_NAN, NAN], 2, [1, 2]),
        ([-INF, -INF, 1], 2, [0, 2]),
        ([1e-45, -1e-45, 0.0], 2, [0, 2]),
        ([-3, -1, -2], 2, [1, 2]),
        ([1, 2], 0, []),
        ([1, 2], 2, [0, 1]),
        ([], 0, []),
        # T2 of the method specification, its three decisions
        ([0.10, 0.30, 0.05, 0.20, 0.15, 0.02, 0.08, 0.10], 4, [0, 1, 3, 4]),
        ([0.02, 0.05, 0.40, 0.10, 0.03, 0.22, 0.11, 0.07], 4, [2, 3, 5, 6]),
        ([0.30, 0.01, 0.02, 0.04, 0.05, 0.35, 0.20, 0.03], 2, [0, 5]),
    ],
)
def test_select_exactly(scores: list[float], keep: int, kept: list[int]) -> None:
    assert single(scores, keep) == kept


FLOATS = st.one_of(st.sampled_from([0.0, -0.0, NAN, NEGATIVE_NAN, INF, -INF, 0.5]), st.floats(width=32))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_select_against_a_loop_on_ragged_batches(data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 3))
    scores, candidates, texts, keep = [], [], [], []
    for _ in range(batch):
        kinds = data.draw(st.lists(st.sampled_from("ctx"), max_size=12))
        candidates.append([i for i, kind in enumerate(kinds) if kind == "c"])
        texts.append([i for i, kind in enumerate(kinds) if kind == "t"])
        count = len(candidates[-1])
        scores.append(data.draw(st.lists(FLOATS, min_size=count, max_size=count)))
        keep.append(data.draw(st.integers(0, count)))
    counts, text_counts = tuple(map(len, candidates)), tuple(map(len, texts))
    n_max, m_max = max(counts) + 1, max(text_counts) + 1
    starts, positions = tuple(20 * b for b in range(batch)), torch.randperm(20 * batch)
    metadata = SelectMetadata(starts, (12,) * batch, counts, text_counts, tuple(keep))
    if is_static := data.draw(st.booleans()):
        most = starts, (20,) * batch, (n_max,) * batch, (m_max,) * batch, (n_max,) * batch
        there = torch.tensor(metadata.as_tuple())
        length = metadata.compact_length + data.draw(st.integers(0, 30))
        metadata = SelectMetadata(*most, on_device=there, static_length=length)
    given_scores = torch.tensor([row + [NAN] * (n_max - len(row)) for row in scores])  # hostile padding
    lists = padded(candidates, width=n_max), padded(texts, width=m_max)
    for part, ends in zip(lists, (counts, text_counts), strict=True):
        for row, end in zip(part, ends, strict=True):
            row[end:] = 99  # hostile too
    got = select(given_scores, SelectRows(*lists, positions, metadata))

    max_k = n_max if is_static else max(keep)
    assert got.kept.shape == (batch, max_k)
    assert got.active_rows.shape == got.active_positions.shape == (batch, metadata.compact_length)
    assert got.scores.shape == (batch, n_max)
    places = {row: place for place, row in enumerate(got.active_rows.flatten().tolist())}
    assert got.inverse_index.tolist() == [places.get(row, -1) for row in range(20 * batch)]
    for b in range(batch):
        best: list[int] = []
        for _ in range(keep[b]):
            rest = [i for i in range(counts[b]) if i not in best]
            top = rest[0]
            for i in rest[1:]:
                ahead = scores[b][i] > scores[b][top] or math.isnan(scores[b][i])
                if ahead and not math.isnan(scores[b][top]):
                    top = i
            best.append(top)
        best.sort()
        active = sorted(20 * b + row for row in texts[b] + [candidates[b][i] for i in best])
        assert got.kept[b].tolist() == best + [-1] * (max_k - keep[b])
        fillers = [-1] * (metadata.compact_length - len(active))
        for rows, wanted in ((got.active_rows, active), (got.active_positions, positions[active].tolist())):
            assert rows[b].tolist() == (wanted + fillers if is_static else fillers + wanted)
        assert torch.equal(got.scores[b, : counts[b]].view(torch.int32), given_scores[b, : counts[b]].view(torch.int32))
        assert got.scores[b, counts[b] :].eq(-INF).all()


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (((), (), (), (), ()), "one integer per sample"),
        (((0,), (4, 4), (2,), (2,), (1,)), "one integer per sample"),
        (((0,), (4,), (2,), (2,), (-1,)), "negative"),
        (((0,), (4,), (2,), (2,), (3,)), "k=3 <= num_candidates=2"),
        (((0,), (4,), (5,), (2,), (3,)), "num_candidates=5 <= kv_len=4"),
        (((0, 3), (4, 4), (2, 2), (2, 2), (1, 1)), "rows 0 to 4 and the next begins at 3"),
    ],
)
def test_contradictory_segments_are_refused(fields: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SelectMetadata(*fields)
