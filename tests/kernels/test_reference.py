from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.glm4v.modeling_glm4v import apply_rotary_pos_emb as glm_rope
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rope

from reroute_kernels import PagedPool, Segments, Selection
from reroute_kernels.reference import admit, defer, rotate, score_topk, select

INF, NAN = math.inf, math.nan
NEGATIVE_NAN = torch.tensor([0xFFC00001 - 2**32], dtype=torch.int32).view(torch.float32).item()


def pad(rows: list[list[int]], width: int, *, right: bool = False) -> Tensor:
    """Ragged lists with -1 behind them, or before them if right-aligned."""
    gap = lambda row: [-1] * (width - len(row))
    padded = [gap(row) + row if right else row + gap(row) for row in rows]
    return torch.tensor(padded, dtype=torch.int64).view(len(rows), width)


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
@given(tables(), st.booleans())
def test_defer_and_admit_against_loops(case: Any, right: bool) -> None:
    page, table, rows, width = case
    index = pad(rows, width, right=right)
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
    companions = [torch.ones(4, 2, dtype=d) for d in (torch.bfloat16, torch.int64, torch.bool)]
    out = admit(torch.ones(2, 2, 4), torch.tensor([1, 0]), torch.tensor([[-1, 3]]), *companions)
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
        expected = glm_rope(x, x, cos, sin)[0]
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
    """Kept ordinals of one sample whose rows are all candidates."""
    n = len(scores)
    selection = select(
        torch.tensor([scores], dtype=torch.float32),
        torch.arange(n)[None],
        torch.empty(1, 0, dtype=torch.int64),
        Segments((0,), (n,), (n,), (0,), (keep,)),
    )
    assert torch.equal(selection.kept, selection.active)
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
    segments = Segments((0,) * batch, (12,) * batch, counts, text_counts, tuple(keep))
    padded = torch.tensor([row + [NAN] * (n_max - len(row)) for row in scores])  # hostile padding
    got = select(padded, pad(candidates, n_max), pad(texts, m_max), segments)

    assert got.kept.shape == (batch, max(keep))
    assert got.active.shape == (batch, segments.width)
    assert got.scores.shape == (batch, n_max)
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
        active = sorted(texts[b] + [candidates[b][i] for i in best])
        assert got.kept[b].tolist() == best + [-1] * (max(keep) - keep[b])
        assert got.active[b].tolist() == [-1] * (segments.width - len(active)) + active
        assert torch.equal(got.scores[b, : counts[b]].view(torch.int32), padded[b, : counts[b]].view(torch.int32))
        assert got.scores[b, counts[b] :].eq(-INF).all()


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (((), (), (), (), ()), "one integer per sample"),
        (((0,), (4, 4), (2,), (2,), (1,)), "one integer per sample"),
        (((0,), (4,), (2,), (2,), (-1,)), "negative"),
        (((0,), (4,), (2,), (2,), (3,)), "keep=3 <= candidates=2"),
        (((0,), (4,), (5,), (2,), (3,)), "candidates=5 <= length=4"),
    ],
)
def test_contradictory_segments_are_refused(fields: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Segments(*fields)


# --- score_topk -----------------------------------------------------------------------------


def from_logits(logits: list[list[float]], candidates: list[int], keep: int) -> Selection:
    """Scores of one sample whose head h has these logits over its rows, one key head each."""
    heads, length = len(logits), len(logits[0])
    return score_topk(
        torch.ones(1, heads, 1),
        torch.tensor(logits).T.reshape(length, heads, 1),
        torch.empty(length, 0),
        torch.empty(length, 0),
        torch.tensor([length - 1]),
        torch.tensor([candidates]),
        torch.tensor([[i for i in range(length) if i not in candidates]]),
        Segments((0,), (length,), (len(candidates),), (length - len(candidates),), (keep,)),
        scale=1.0,
    )


def test_t4_the_mean_is_over_probabilities() -> None:
    got = from_logits([[2, 0, 0], [-2, 1, 0.8]], [0, 1], 1)
    assert got.scores[0].tolist() == pytest.approx([0.406816, 0.320845], abs=1e-6)
    assert got.kept.tolist() == [[0]]
    assert got.active.tolist() == [[0, 2]]


def test_t5_the_pool_matters() -> None:
    with_deferred = from_logits([[1, 0, 5, 0], [0, 0.5, -5, 0]], [0, 1], 1)
    assert with_deferred.scores[0].tolist() == pytest.approx([0.145657, 0.228780], abs=1e-6)
    assert with_deferred.kept.tolist() == [[1]]
    without = from_logits([[1, 0, 0], [0, 0.5, 0]], [0, 1], 1)
    assert without.scores[0].tolist() == pytest.approx([0.425093, 0.331902], abs=1e-6)
    assert without.kept.tolist() == [[0]]


def test_t18_query_heads_share_key_heads_in_blocks() -> None:
    # Key head 0 points at row 0, key head 1 at row 1; each query head alone shows whom it reads.
    keys = torch.tensor([[[9.0], [0.0]], [[0.0], [9.0]]])
    readers = []
    for head in range(4):
        query = torch.zeros(1, 4, 1)
        query[0, head] = 1.0
        selection = score_topk(
            query,
            keys,
            torch.empty(2, 0),
            torch.empty(2, 0),
            torch.tensor([1]),
            torch.tensor([[0, 1]]),
            torch.empty(1, 0, dtype=torch.int64),
            Segments((0,), (2,), (2,), (0,), (1,)),
            scale=1.0,
        )
        readers.append(selection.kept.item())
    assert readers == [0, 0, 1, 1]


def test_uneven_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key heads"):
        score_topk(
            torch.ones(1, 3, 4),
            torch.ones(2, 2, 4),
            torch.empty(2, 0),
            torch.empty(2, 0),
            torch.tensor([1]),
            torch.tensor([[0]]),
            torch.tensor([[1]]),
            Segments((0,), (2,), (1,), (1,), (1,)),
            scale=1.0,
        )


def naive_rope(x: list[float], cos: list[float], sin: list[float], layout: str) -> list[float]:
    rot, out = len(cos), list(x)
    for i in range(rot // 2):
        a, b = (i, i + rot // 2) if layout == "half" else (2 * i, 2 * i + 1)
        out[a], out[b] = x[a] * cos[a] - x[b] * sin[a], x[b] * cos[b] + x[a] * sin[b]
    return out


class Problem:
    """A ragged batch of three: with answer text behind the query, dense, and without candidates."""

    page = 8
    heads, groups, dim = 6, 2, 8
    lengths = (13, 9, 5)  # up to and including the query
    totals = (15, 9, 5)  # with the rows behind it
    candidates = ([2, 3, 4, 5, 7, 8, 9, 10], [1, 2, 3], [])
    keep = (3, 3, 0)

    def __init__(self, layout: Any, rot: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        random = lambda *shape: torch.randn(*shape, generator=generator)
        counts = [-(-total // self.page) for total in self.totals]
        self.starts = tuple(sum(counts[:b]) * self.page for b in range(3))
        rows = sum(counts) * self.page
        self.layout = layout
        self.query = random(3, self.heads, self.dim).to(dtype)
        self.keys = random(rows, self.groups, self.dim).to(dtype)
        for start, total, count in zip(self.starts, self.totals, counts, strict=True):
            self.keys[start + total : start + count * self.page] = NAN  # page tails are not read
        angles = random(rows, rot // 2)
        angles = angles.repeat(1, 2) if layout == "half" else angles.repeat_interleave(2, -1)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        self.texts = [
            [i for i in range(total) if i not in visual]
            for total, visual in zip(self.totals, self.candidates, strict=True)
        ]

    def run(self, samples: tuple[int, ...] = (0, 1, 2), *, shift: bool = False) -> Selection:
        """The chosen samples in this order; shift: copied to the front of a lease of their own."""
        pick = lambda values: tuple(values[b] for b in samples)
        starts, keys, cos, sin = pick(self.starts), self.keys, self.cos, self.sin
        if shift:
            (start,), (total,) = starts, pick(self.totals)
            keys, cos, sin = (t[start : start + total].clone() for t in (keys, cos, sin))
            starts = (0,)
        candidates, texts = list(pick(self.candidates)), list(pick(self.texts))
        return score_topk(
            self.query[list(samples)],
            keys,
            cos,
            sin,
            torch.tensor([s + n - 1 for s, n in zip(starts, pick(self.lengths), strict=True)]),
            pad(candidates, max(map(len, candidates))),
            pad(texts, max(map(len, texts))),
            Segments(
                starts,
                pick(self.lengths),
                tuple(map(len, candidates)),
                tuple(map(len, texts)),
                pick(self.keep),
            ),
            scale=self.dim**-0.5,
            rope=self.layout,
        )

    def naive(self, b: int) -> list[float]:
        """Scores of sample b in fp64 by loops."""
        start, length = self.starts[b], self.lengths[b]
        cos, sin = self.cos.double().tolist(), self.sin.double().tolist()
        keys, total = self.keys.double().tolist(), [0.0] * length
        for h in range(self.heads):
            q = self.query[b, h].double().tolist()
            q = naive_rope(q, cos[start + length - 1], sin[start + length - 1], self.layout)
            exps = []
            for row in range(start, start + length):
                key = keys[row][h * self.groups // self.heads]
                k = naive_rope(key, cos[row], sin[row], self.layout)
                dot = sum(x * y for x, y in zip(q, k, strict=True))
                exps.append(math.exp(dot * self.dim**-0.5))
            total = [t + e / sum(exps) / self.heads for t, e in zip(total, exps, strict=True)]
        return [total[i] for i in self.candidates[b]]


@pytest.mark.parametrize("rot", [0, 4, 8])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_score_topk_against_fp64_loops(layout: str, rot: int) -> None:
    problem = Problem(layout, rot)
    got = problem.run()
    for b, keep in enumerate(problem.keep):
        expected, count = problem.naive(b), len(problem.candidates[b])
        assert got.scores[b, :count].tolist() == pytest.approx(expected, abs=1e-6)
        assert got.scores[b, count:].eq(-INF).all()
        best = sorted(sorted(range(count), key=lambda i: -expected[i])[:keep])
        assert got.kept[b].tolist() == best + [-1] * (3 - keep)
        active = sorted(problem.texts[b] + [problem.candidates[b][i] for i in best])
        assert got.active[b].tolist() == [-1] * (10 - len(active)) + active
    assert got.active[0, -2:].tolist() == [13, 14]  # text behind the query stays active
    assert got.scores.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_does_not_see_its_neighbours(dtype: torch.dtype) -> None:
    problem = Problem("half", 8, dtype)
    batch, reverse = problem.run(), problem.run((2, 1, 0))
    for b in range(3):
        alone = problem.run((b,), shift=True)
        count, active = len(problem.candidates[b]), alone.active.shape[1]
        for got, at in ((batch, b), (reverse, 2 - b)):
            assert torch.equal(got.scores[at, :count], alone.scores[0, :count])
            assert torch.equal(got.kept[at, : problem.keep[b]], alone.kept[0])
            assert torch.equal(got.active[at, -active:], alone.active[0])


def test_bf16_logits_are_fp32_after_a_bf16_rotation() -> None:
    problem = Problem("half", 8, torch.bfloat16)
    got = problem.run()
    last = problem.starts[0] + problem.lengths[0] - 1
    q, k = problem.query[0, None, :, None], problem.keys[None, :13].transpose(1, 2)  # (1, heads, rows, D)
    cos, sin = problem.cos[None], problem.sin[None]
    q = llama_rope(q, q, cos[:, last : last + 1], sin[:, last : last + 1])[0].double()
    k = llama_rope(k, k, cos[:, :13], sin[:, :13])[0].repeat_interleave(3, dim=1).double()
    logits = (q @ k.transpose(2, 3))[0, :, 0] * problem.dim**-0.5
    expected = logits.softmax(-1).mean(0)[list(problem.candidates[0])]
    assert got.scores[0].tolist() == pytest.approx(expected.tolist(), abs=1e-6)


# --- no device synchronisation ----------------------------------------------------------------


def test_all_operations_under_fake_tensors() -> None:
    with FakeTensorMode():  # reading a value, as a device synchronisation does, raises here
        pool = PagedPool(16, torch.bfloat16, "cpu", page_size=4)
        with pool.lease([9, 3]) as lease:
            segments = Segments(lease.starts, (9, 3), (6, 0), (3, 3), (2, 0))
            selection = score_topk(
                torch.randn(2, 4, 8, dtype=torch.bfloat16),
                torch.randn(lease.num_rows, 2, 8, dtype=torch.bfloat16),
                torch.randn(lease.num_rows, 8),
                torch.randn(lease.num_rows, 8),
                torch.zeros(2, dtype=torch.int64),
                torch.zeros(2, 6, dtype=torch.int64),
                torch.zeros(2, 3, dtype=torch.int64),
                segments,
                scale=0.5,
            )
            assert selection.kept.shape == (2, 2)
            assert selection.active.shape == (2, segments.width) == (2, 5)
            cos = torch.randn(lease.num_rows, 8)
            hidden, cos = admit(lease.pages, lease.table, selection.active, cos)
            assert (hidden.shape, cos.shape) == ((2, 5, 16), (2, 5, 8))
            defer(lease.pages, lease.table, selection.active, hidden)
