"""The score kernel and the selection behind it, on every executor."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
import torch
from cases import ScoreCase, ScoreInputs, ScoreShape, exact, gibibytes, make_rows_long, num_compiled
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reroute_kernels import AttentionSpec, RMSNorm, RopeTables, Selection, SelectMetadata, SelectRows, reference

KERNEL = "score"
pytestmark = pytest.mark.usefixtures("seeded")
INF, NAN = math.inf, math.nan
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def normed(keys: Tensor, norm: RMSNorm | None, dtype: torch.dtype) -> Tensor:
    """``keys`` in ``dtype`` after their norm, which is made in fp32 at least."""
    if norm is None:
        return keys.to(dtype)
    wide = keys.to(torch.promote_types(dtype, FP32))
    return (wide / (wide.square().mean(-1, keepdim=True) + norm.eps).sqrt()).to(dtype) * norm.weight.to(dtype)


def truth(inputs: ScoreInputs, work: torch.dtype, rotate: torch.dtype) -> list[Tensor]:
    """Scores per sample with norms and rotations in one dtype, and logits and softmax in another."""
    query, keys, (cos, sin, last), (candidates, _, _, metadata), spec = inputs
    scores = []
    for b, (start, length, n) in enumerate(
        zip(metadata.starts, metadata.kv_lens, metadata.num_candidates, strict=True)
    ):
        if n == 0:  # such a sample need not have a query
            scores.append(torch.empty(0, dtype=torch.float64, device=query.device))
            continue
        row, span = last[b : b + 1], slice(start, start + length)
        q = reference.rotate(query[b : b + 1].to(rotate), cos[row], sin[row], spec.rope).to(work)[0]
        k = reference.rotate(normed(keys[span], spec.key_norm, rotate), cos[span], sin[span], spec.rope).to(work)
        k = k.repeat_interleave(q.shape[0] // k.shape[1], 1)
        logits = torch.einsum("hd,lhd->hl", q, k) * spec.scale
        scores.append(logits.softmax(-1).mean(0)[candidates[b, :n]].double())
    return scores


def near(inputs: ScoreInputs, got: Selection, rtol: float = 3e-5) -> None:
    """To fp64 logits after the same rotation."""
    wanted = truth(inputs, work=torch.float64, rotate=inputs.query.dtype)
    for row, right in zip(got.scores, wanted, strict=True):
        assert torch.allclose(row[: len(right)].double(), right, rtol=rtol, atol=1e-9)


def close(inputs: ScoreInputs, got: Selection, rtol: float = 3e-5) -> None:
    """Near; and to fp64 throughout, no worse than all in the model's dtype."""
    near(inputs, got, rtol)
    dtype = inputs.query.dtype
    for row, far, plain in zip(
        got.scores,
        truth(inputs, work=torch.float64, rotate=torch.float64),
        truth(inputs, work=dtype, rotate=dtype),
        strict=True,
    ):
        if len(far):
            # The rounding of the rotation, which all share, is most of the error: hence a mean and a margin.
            error = (row[: len(far)].double() - far).abs().mean()
            assert error <= 1.25 * (plain - far).abs().mean() + 1e-6


MODELS = [
    ScoreShape(28, 4, 128, 128, "half", BF16),  # Qwen2.5-VL-7B
    ScoreShape(8, 8, 128, 128, "half", FP16),  # LLaVA: a key head per query head
    ScoreShape(24, 8, 64, 64, "half", BF16),  # key heads in twos
    ScoreShape(32, 32, 16, 16, "half", BF16),  # and in two programs
    ScoreShape(16, 2, 80, 80, "half", BF16),
    ScoreShape(4, 2, 96, 48, "half", FP16),  # partial
    ScoreShape(12, 2, 64, 64, "interleaved", BF16),
    ScoreShape(4, 1, 128, 64, "interleaved", FP16),  # partial, one key head
    ScoreShape(40, 2, 16, 16, "half", BF16),  # more than a block of query heads for a key head
    ScoreShape(3, 3, 256, 256, "half", BF16),
    ScoreShape(16, 2, 256, 64, "half", BF16),  # Qwen3.5
    ScoreShape(8, 8, 192, 64, "half", BF16),  # Kimi K2.5: heads made of latent keys
    ScoreShape(6, 3, 32, 0, "half", BF16),  # no rotary embedding
    ScoreShape(6, 2, 64, 32, "half", FP32),
    ScoreShape(4, 2, 32, 24, "interleaved", FP32),
]
MODELS_WITH_KEY_NORMS = [  # which have smaller tiles
    ScoreShape(16, 8, 128, 128, "half", BF16),  # Qwen3-VL
    ScoreShape(4, 2, 64, 64, "half", FP16),
    ScoreShape(4, 4, 64, 16, "interleaved", FP32),
    ScoreShape(7, 1, 128, 64, "interleaved", BF16),
    ScoreShape(4, 2, 256, 256, "half", BF16),
    ScoreShape(4, 4, 256, 64, "half", FP32),
    ScoreShape(8, 8, 80, 80, "half", FP16),  # what pads the features must not count
    ScoreShape(6, 2, 96, 48, "half", FP32),
]


@pytest.mark.parametrize("shape", MODELS, ids=str)
def test_models(kernel: Any, device: torch.device, shape: ScoreShape) -> None:
    inputs = ScoreCase([150, 65], [100, 64], [33, 20], shape, poison=NAN).inputs(device)
    got = kernel.score_topk(*inputs)
    exact(inputs.rows, got)
    close(inputs, got)


@pytest.mark.parametrize("shape", MODELS_WITH_KEY_NORMS, ids=str)
def test_key_norms(kernel: Any, device: torch.device, shape: ScoreShape) -> None:
    """Of keys that differ in size by six orders of magnitude."""
    inputs = ScoreCase([90, 65], [80, 64], [33, 20], shape, poison=NAN).inputs(device)
    sizes = torch.logspace(-3, 3, len(inputs.keys), device=device)[:, None, None]
    norm = RMSNorm((torch.rand(shape.head_dim, device=device) + 0.5).to(shape.dtype), 1e-6)
    inputs = inputs._replace(keys=inputs.keys * sizes.to(shape.dtype), spec=inputs.spec._replace(key_norm=norm))
    got = kernel.score_topk(*inputs)
    exact(inputs.rows, got)
    # The order of a sum of squares may turn one rounding to the model's dtype.
    close(inputs, got, rtol=3e-5 if shape.dtype == FP32 else 5e-3)


@given(st.data())
def test_any_decision(kernel: Any, device: torch.device, data: st.DataObject) -> None:
    """Ragged batches of any counts, in a few shapes: each new one compiles."""
    lengths = data.draw(st.lists(st.integers(0, 100), min_size=1, max_size=3))
    gaps = data.draw(st.integers(0, 4))
    counts = [data.draw(st.integers(0, max(length - 1 - gaps, 0))) for length in lengths]
    keep = [data.draw(st.integers(0, n)) for n in counts]
    heads, groups, rotary_dim = data.draw(st.sampled_from([(4, 2, 16), (3, 3, 8), (6, 1, 0)]))
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    shape = ScoreShape(heads, groups, rotary_dim=rotary_dim, dtype=data.draw(st.sampled_from([BF16, FP32])))
    inputs = ScoreCase(lengths, counts, keep, shape, gaps=gaps, poison=NAN).inputs(device)
    got = kernel.score_topk(*inputs)
    exact(inputs.rows, got)
    near(inputs, got)


def test_ragged_batches(kernel: Any, device: torch.device) -> None:
    """Nothing, one candidate, all and none kept, rows that are neither candidate nor text."""
    lengths, counts, keep = [0, 1, 9, 40, 300, 64], [0, 0, 1, 20, 280, 63], [0, 0, 1, 0, 280, 30]
    for gaps in (0, 1):
        inputs = ScoreCase(lengths, counts, keep, gaps=gaps, poison=INF).inputs(device)
        got = kernel.score_topk(*inputs)
        exact(inputs.rows, got)
        close(inputs, got)


def test_samples_without_candidates_only(kernel: Any, device: torch.device) -> None:
    """They need no query."""
    inputs = ScoreCase([5, 0], [0, 0], [0, 0]).inputs(device)
    tables = inputs.tables._replace(query_rows=torch.full_like(inputs.tables.query_rows, -1))
    got = kernel.score_topk(*inputs._replace(tables=tables))
    assert got.kept.shape == (2, 0)
    assert got.active_rows.tolist() == got.active_positions.tolist() == [[0, 1, 2, 3, 4], [-1] * 5]


def test_a_row_equals_the_sample_alone(kernel: Any, device: torch.device) -> None:
    """Bit for bit, whoever else is in the batch."""
    lengths, counts, keep = [130, 1100, 70], [100, 1050, 60], [30, 500, 7]
    inputs = ScoreCase(lengths, counts, keep, ScoreShape(6, dtype=BF16)).inputs(device)
    together = kernel.score_topk(*inputs)
    query, keys, (cos, sin, last), (candidates, texts, positions, metadata), spec = inputs
    for b, (n, m, k) in enumerate(zip(counts, metadata.num_texts, keep, strict=True)):
        single = SelectMetadata(*(column[b : b + 1] for column in metadata.as_tuple()))
        rows = SelectRows(candidates[b : b + 1, :n].clone(), texts[b : b + 1, :m].clone(), positions, single)
        alone = kernel.score_topk(query[b : b + 1], keys, RopeTables(cos, sin, last[b : b + 1]), rows, spec)
        assert torch.equal(alone.scores[0].view(torch.int32), together.scores[b, :n].view(torch.int32))
        assert torch.equal(alone.kept[0], together.kept[b, :k])
        assert torch.equal(alone.active_rows[0], together.active_rows[b, together.active_rows.shape[1] - m - k :])


def test_many_parts_and_any_number_of_key_heads(
    kernel: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several tiles a part, as in long prompts. The bits do not depend on how many key heads a program takes."""
    inputs = ScoreCase([400], [390], [90], ScoreShape(8, 4, dtype=BF16)).inputs(device)
    plain = kernel.score_topk(*inputs)
    usual = kernel.tiling(8, 4, 16, 2, norm=False)
    for warps in (1, 2):
        monkeypatch.setattr(kernel, "tiling", lambda *_: usual._replace(num_warps=warps))  # noqa: B023
        assert torch.equal(kernel.score_topk(*inputs).scores, plain.scores)
    for joined, most in ((1, 3), (2, 40)):  # 25 parts of two tiles are enough
        monkeypatch.setattr(kernel, "tiling", lambda *_: kernel.Tiling(2, joined, 16, 8))  # noqa: B023
        monkeypatch.setattr(kernel, "most_splits", lambda _: most)  # noqa: B023
        got = kernel.score_topk(*inputs)
        exact(inputs.rows, got)
        close(inputs, got)


@pytest.mark.parametrize(("heads", "groups", "dtype"), [(4, 2, FP32), (8, 8, BF16)])
@pytest.mark.parametrize("value", [NAN, INF, pytest.param(-INF, marks=pytest.mark.slow)])
def test_broken_keys_show_and_corrupt_nothing(
    kernel: Any, device: torch.device, heads: int, groups: int, dtype: torch.dtype, value: float
) -> None:
    inputs = ScoreCase([140, 100], [130, 90], [20, 20], ScoreShape(heads, groups, dtype=dtype)).inputs(device)
    clean = kernel.score_topk(*inputs)
    inputs.keys[7, 0, 3] = value  # of the first sample
    got = kernel.score_topk(*inputs)
    exact(inputs.rows, got)
    wanted = reference.score_topk(*inputs)
    assert torch.equal(got.scores[0].isnan(), wanted.scores[0].isnan())
    assert torch.equal(got.scores[1], clean.scores[1])


def test_logits_of_minus_infinity(kernel: Any, device: torch.device) -> None:
    """A whole tile of them counts for nothing; a head of nothing else is NaN, as softmax makes it."""
    inputs = ScoreCase([200], [190], [20], ScoreShape(2, 1, rotary_dim=0)).inputs(device)
    inputs = inputs._replace(query=inputs.query.abs() * 100)
    inputs.keys[:128] = -3e38
    for _ in range(2):
        got, wanted = kernel.score_topk(*inputs), reference.score_topk(*inputs)
        assert torch.allclose(got.scores, wanted.scores, equal_nan=True)
        exact(inputs.rows, got)
        inputs.keys[:] = -3e38
    assert wanted.scores.isnan().all()


def test_tables_of_another_dtype_and_odd_strides(kernel: Any, device: torch.device) -> None:
    """fp32 tables round to the dtype of the keys. Keys and queries may be slices of fused projections, keys transposed,
    and each table one of a wider one.
    """
    inputs = ScoreCase([70, 90], [60, 80], [9, 9], ScoreShape(dtype=BF16), table_dtype=FP32).inputs(device)
    wanted = kernel.score_topk(*inputs)
    close(inputs, wanted)
    query, keys, tables, rows, spec = inputs
    fused = torch.cat((keys, keys + 1), dim=1)[:, : keys.shape[1]]
    transposed = keys.transpose(0, 2).contiguous().transpose(0, 2)
    for other in (fused, transposed, torch.cat((keys, keys[..., :3]), -1)[..., :-3]):
        transposed_cos = tables._replace(cos=tables.cos.t().contiguous().t())
        got = kernel.score_topk(query, other, transposed_cos, rows, spec)
        assert torch.equal(got.scores, wanted.scores)
    every_other_head = torch.stack((query, query + 1), 2).flatten(1, 2)[:, ::2]
    wide = torch.cat((tables.sin, tables.cos), 1)[:, : tables.sin.shape[1]]
    got = kernel.score_topk(every_other_head, keys, tables._replace(sin=wide), rows, spec)
    assert torch.equal(got.scores, wanted.scores)


@pytest.mark.parametrize("which", ["query", "keys"])
def test_rows_that_are_gibibytes_apart(executor: Any, kernel: Any, device: torch.device, which: str) -> None:
    """No offset is counted in 32 bits."""
    inputs = ScoreCase([40, 30, 9], [30, 20, 5], [9, 9, 2], ScoreShape(dtype=BF16)).inputs(device)
    wanted = kernel.score_topk(*inputs)
    near = getattr(inputs, which)
    last = len(near) - 1 if which == "query" else int(inputs.tables.query_rows.max())
    stride = -(-(2**31) // last)  # the last row that is scored is beyond
    far = gibibytes(executor, stride * len(near), BF16).as_strided(near.shape, (stride, *near.stride()[1:])).copy_(near)
    got = kernel.score_topk(*(inputs._replace(query=far) if which == "query" else inputs._replace(keys=far)))
    assert torch.equal(got.scores, wanted.scores)


def test_a_crowd_of_a_long_row(kernel: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The score launch makes all counters zero, those of refining too."""
    from reroute_kernels.triton_kernels import select

    make_rows_long(select, monkeypatch, crowd=0)
    inputs = ScoreCase([140], [130], [40], ScoreShape(dtype=BF16)).inputs(device)
    exact(inputs.rows, kernel.score_topk(*inputs._replace(query=inputs.query * 1e-3)))


def test_two_threads_may_decide_at_once(kernel: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two launches of one decision the other launches both of its own, on the same stream."""
    first, second = (ScoreCase([70, 60], [n, 50], [9, 20]).inputs(device) for n in (60, 41))
    wanted = [kernel.score_topk(*inputs) for inputs in (first, second)]
    select, between = kernel.launch_select, []

    def interrupted(*arguments: Any) -> Selection:
        monkeypatch.setattr(kernel, "launch_select", select)
        between.append(kernel.score_topk(*second))
        return select(*arguments)  # type: ignore[no-any-return]

    monkeypatch.setattr(kernel, "launch_select", interrupted)
    for got, right in zip([kernel.score_topk(*first), *between], wanted, strict=True):
        assert all(map(torch.equal, got, right))


def test_where_the_index_lists_begin_compiles_nothing_anew(executor: Any, kernel: Any, device: torch.device) -> None:
    """They are pieces of one upload, so any of them may begin at an odd multiple of 8 bytes."""
    from reroute_kernels.triton_kernels import select

    compiled = partial(num_compiled, executor, kernel._score_kernel, select._select_kernel)
    inputs = ScoreCase([90, 70], [61, 50], [9, 20]).inputs(device)
    metadata = inputs.rows.metadata
    wanted, before = kernel.score_topk(*inputs), compiled()
    assert before
    given = inputs.tables.query_rows, *inputs.rows[:3], torch.tensor(metadata.as_tuple(), device=device)
    for moved in range(5):
        lists = list(given)
        lists[moved] = torch.cat((lists[moved].new_zeros(1), lists[moved].flatten()))[1:].view(lists[moved].shape)
        assert lists[moved].data_ptr() % 16 == 8
        query_rows, candidates, texts, positions, counts = lists
        rows = SelectRows(candidates, texts, positions, replace(metadata, on_device=counts))
        tables = inputs.tables._replace(query_rows=query_rows)
        got = kernel.score_topk(*inputs._replace(tables=tables, rows=rows))
        assert all(map(torch.equal, got, wanted))
    assert compiled() == before


def test_what_cannot_be_is_refused(kernel: Any, device: torch.device) -> None:
    inputs = ScoreCase([9], [5], [2], ScoreShape(4, 3)).inputs(device)
    with pytest.raises(ValueError, match="4 query heads cannot share 3 key heads"):
        kernel.score_topk(*inputs)
    inputs = ScoreCase([9], [5], [2]).inputs(device)
    with pytest.raises(ValueError, match="'half', 'interleaved'"):
        kernel.score_topk(*inputs._replace(spec=AttentionSpec(1.0, cast(Any, "neox"))))
    norm = RMSNorm(inputs.keys.new_ones(1), 1e-6)
    with pytest.raises(ValueError, match=r"a key norm of \(1,\) features is not one of"):
        kernel.score_topk(*inputs._replace(spec=inputs.spec._replace(key_norm=norm)))


@pytest.mark.parametrize(("heads", "groups"), [(28, 4), (32, 32), pytest.param(64, 8, marks=pytest.mark.slow)])
def test_two_launches_and_the_least_bytes(
    kernel: Any,
    device: torch.device,
    launches: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    heads: int,
    groups: int,
) -> None:
    """Of Qwen 7B, LLaVA 7B and Qwen 72B: whatever the score launch reads and writes, with 384 keys to a program.

    A program reads the query once, so fewer keys a program, which a short prompt needs to fill a GPU, cost more
    requests. They go to caches: keys are read once at any length.
    """
    length = 768
    inputs = ScoreCase([length], [740], [185], ScoreShape(heads, groups, 128, dtype=BF16)).inputs(device)
    monkeypatch.setattr(kernel, "most_splits", lambda _: 2)
    kernel.score_topk(*inputs)
    score, select = launches
    assert score.bytes_requested <= 1.06 * score.minimal_bytes
    assert score.bytes_moved <= 1.06 * score.minimal_bytes
    assert score.tensors["keys_ptr"].load_bytes == length * groups * 128 * 2
    assert score.global_load.efficiency >= 0.95
    assert score.global_store.efficiency >= 0.95
    assert select.tensors["source_ptr"].load_bytes <= 1.06 * 740 * heads * 4
