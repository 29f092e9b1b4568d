"""Scores of the reference, and what is selected by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
import torch
from tensors import padded
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rope
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from reroute_kernels import AttentionSpec, RMSNorm, RopeTables, Selection, SelectMetadata, SelectRows
from reroute_kernels.reference import score_topk

INF, NAN = math.inf, math.nan
T = TypeVar("T")


def from_logits(logits: list[list[float]], candidates: list[int], keep: int) -> Selection:
    """Scores of one sample whose head h has these logits over its rows, one key head each."""
    heads, length = len(logits), len(logits[0])
    return score_topk(
        torch.ones(1, heads, 1),
        torch.tensor(logits).T.reshape(length, heads, 1),
        RopeTables(torch.empty(length, 0), torch.empty(length, 0), torch.tensor([length - 1])),
        SelectRows(
            torch.tensor([candidates]),
            torch.tensor([[i for i in range(length) if i not in candidates]]),
            torch.arange(length),
            SelectMetadata((0,), (length,), (len(candidates),), (length - len(candidates),), (keep,)),
        ),
        AttentionSpec(1.0),
    )


def test_t4_the_mean_is_over_probabilities() -> None:
    got = from_logits([[2, 0, 0], [-2, 1, 0.8]], [0, 1], 1)
    assert got.scores[0].tolist() == pytest.approx([0.406816, 0.320845], abs=1e-6)
    assert got.kept.tolist() == [[0]]
    assert got.active_rows.tolist() == [[0, 2]]


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
            RopeTables(torch.empty(2, 0), torch.empty(2, 0), torch.tensor([1])),
            SelectRows(
                torch.tensor([[0, 1]]),
                torch.empty(1, 0, dtype=torch.int64),
                torch.arange(2),
                SelectMetadata((0,), (2,), (2,), (0,), (1,)),
            ),
            AttentionSpec(1.0),
        )
        readers.append(selection.kept.item())
    assert readers == [0, 0, 1, 1]


def test_uneven_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key heads"):
        score_topk(
            torch.ones(1, 3, 4),
            torch.ones(2, 2, 4),
            RopeTables(torch.empty(2, 0), torch.empty(2, 0), torch.tensor([1])),
            SelectRows(
                torch.tensor([[0]]), torch.tensor([[1]]), torch.arange(2), SelectMetadata((0,), (2,), (1,), (1,), (1,))
            ),
            AttentionSpec(1.0),
        )


def naive_rope(x: list[float], cos: list[float], sin: list[float], layout: str) -> list[float]:
    rot, out = len(cos), list(x)
    for i in range(rot // 2):
        a, b = (i, i + rot // 2) if layout == "half" else (2 * i, 2 * i + 1)
        out[a], out[b] = x[a] * cos[a] - x[b] * sin[a], x[b] * cos[b] + x[a] * sin[b]
    return out


class RaggedBatch:
    """A ragged batch of three: with answer text behind the query, dense, and without candidates."""

    page = 8
    heads, groups, dim = 6, 2, 8
    lengths = (13, 9, 5)  # up to and including the query
    totals = (15, 9, 5)  # with the rows behind it
    candidates: tuple[list[int], ...] = ([2, 3, 4, 5, 7, 8, 9, 10], [1, 2, 3], [])
    keep = (3, 3, 0)

    def __init__(self, layout: Any, rot: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        random: Callable[..., Tensor] = lambda *shape: torch.randn(*shape, generator=generator)
        counts = [-(-total // self.page) for total in self.totals]
        self.starts = tuple(sum(counts[:b]) * self.page for b in range(3))
        rows = sum(counts) * self.page
        self.layout, self.positions = layout, torch.arange(rows) * 3
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

    def run(
        self, samples: tuple[int, ...] = (0, 1, 2), *, shift: bool = False, key_norm: RMSNorm | None = None
    ) -> Selection:
        """The chosen samples in this order; shift: copied to the front of a lease of their own."""

        def pick(values: Sequence[T]) -> tuple[T, ...]:
            return tuple(values[b] for b in samples)

        starts, keys, cos, sin, positions = pick(self.starts), self.keys, self.cos, self.sin, self.positions
        if shift:
            (start,), (total,) = starts, pick(self.totals)
            tensors = keys, cos, sin, positions
            keys, cos, sin, positions = (t[start : start + total].clone() for t in tensors)
            starts = (0,)
        candidates, texts = list(pick(self.candidates)), list(pick(self.texts))
        return score_topk(
            self.query[list(samples)],
            keys,
            RopeTables(cos, sin, torch.tensor([s + n - 1 for s, n in zip(starts, pick(self.lengths), strict=True)])),
            SelectRows(
                padded(candidates),
                padded(texts),
                positions,
                SelectMetadata(
                    starts,
                    pick(self.lengths),
                    tuple(map(len, candidates)),
                    tuple(map(len, texts)),
                    pick(self.keep),
                ),
            ),
            AttentionSpec(self.dim**-0.5, self.layout, key_norm),
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
    batch = RaggedBatch(layout, rot)
    got = batch.run()
    for b, keep in enumerate(batch.keep):
        expected, count = batch.naive(b), len(batch.candidates[b])
        assert got.scores[b, :count].tolist() == pytest.approx(expected, abs=1e-6)
        assert got.scores[b, count:].eq(-INF).all()
        best = sorted(sorted(range(count), key=lambda i: -expected[i])[:keep])
        assert got.kept[b].tolist() == best + [-1] * (3 - keep)
        active = sorted(batch.texts[b] + [batch.candidates[b][i] for i in best])
        active = [batch.starts[b] + i for i in active]
        assert got.active_rows[b].tolist() == [-1] * (10 - len(active)) + active
        assert got.active_positions[b].tolist() == [-1] * (10 - len(active)) + batch.positions[active].tolist()
    assert got.active_rows[0, -2:].sub(batch.starts[0]).tolist() == [13, 14]  # text behind the query stays active
    assert got.scores.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_does_not_see_its_neighbours(dtype: torch.dtype) -> None:
    batch = RaggedBatch("half", 8, dtype)
    batches = {samples: batch.run(samples) for samples in ((0, 1, 2), (0, 1), (0, 2), (1, 2))}
    for b in range(3):
        alone = batch.run((b,), shift=True)
        count, active = len(batch.candidates[b]), alone.active_rows.shape[1]
        for got, at in ((got, samples.index(b)) for samples, got in batches.items() if b in samples):
            assert torch.equal(got.scores[at, :count], alone.scores[0, :count])
            assert torch.equal(got.kept[at, : batch.keep[b]], alone.kept[0])
            assert torch.equal(got.active_rows[at, -active:] - batch.starts[b], alone.active_rows[0])
            assert torch.equal(got.active_positions[at, -active:], alone.active_positions[0])


def test_bf16_logits_are_fp32_after_a_bf16_rotation() -> None:
    batch = RaggedBatch("half", 8, torch.bfloat16)
    got = batch.run()
    last = batch.starts[0] + batch.lengths[0] - 1
    q, k = batch.query[0, None, :, None], batch.keys[None, :13].transpose(1, 2)  # (1, heads, rows, D)
    cos, sin = batch.cos[None], batch.sin[None]
    q = llama_rope(q, q, cos[:, last : last + 1], sin[:, last : last + 1])[0].double()
    k = llama_rope(k, k, cos[:, :13], sin[:, :13])[0].repeat_interleave(3, dim=1).double()
    logits = (q @ k.transpose(2, 3))[0, :, 0] * batch.dim**-0.5
    expected = logits.softmax(-1).mean(0)[list(batch.candidates[0])]
    assert got.scores[0].tolist() == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_key_norm_is_that_of_qwen3(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = Qwen3RMSNorm(8, eps=1e-3).to(dtype)
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    batch = RaggedBatch("half", 8, dtype)
    keys = batch.keys.clone()
    got = batch.run(key_norm=RMSNorm(norm.weight.detach(), 1e-3))
    batch.keys = norm(keys).detach()
    assert all(torch.equal(a, b) for a, b in zip(got, batch.run(), strict=True))
    with pytest.raises(ValueError, match=r"a key norm of \(1,\) features is not one of 8"):
        batch.run(key_norm=RMSNorm(torch.ones(1), 1e-3))
