"""The selection kernel against the reference: any fp32 scores, counts and row lists, on every executor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_cases import rows_of, split
from torch import Tensor

from reroute_kernels import Segments, Selection, reference

INF, NAN = math.inf, math.nan
NEGATIVE_NAN = torch.tensor([0xFFC00001 - 2**32], dtype=torch.int32).view(torch.float32).item()
SPECIAL = torch.tensor([0.0, -0.0, NAN, NEGATIVE_NAN, INF, -INF, 0.5, 1e-45, -1e-45, 3.4e38, -1.0])


@pytest.fixture(scope="module")
def kernel(executor: Any) -> Any:
    from reroute_kernels.triton_kernels import select

    return select


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def same(got: Selection, wanted: Selection) -> None:
    """Equal to the bit, NaN payloads included."""
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        a, b = (t.view(torch.int32) if t.dtype == torch.float32 else t for t in (a, b))
        assert torch.equal(a, b)


def check(
    kernel: Any, scores: list[Tensor], keep: list[int], device: torch.device, *, texts: int = 3, gaps: int = 0
) -> None:
    """One launch on a ragged batch whose lists have random rows."""
    counts = [len(s) for s in scores]
    parts = [split(n + texts + gaps, n, gaps=gaps) for n in counts]
    candidates, text_rows = (rows_of([part[i] for part in parts], device) for i in (0, 1))
    lengths = tuple(n + texts + gaps for n in counts)
    segments = Segments((0,) * len(counts), lengths, tuple(counts), tuple(len(t) for _, t in parts), tuple(keep))
    padded = torch.full((len(counts), max(counts)), NAN)  # never read beyond the counts
    for row, score in zip(padded, scores, strict=True):
        row[: len(score)] = score
    arguments = padded.to(device), candidates, text_rows, segments
    same(kernel.select(*arguments), reference.select(*arguments))


@pytest.mark.parametrize("kind", ["normal", "softmax", "special", "equal", "few"])
def test_values(kernel: Any, device: torch.device, kind: str) -> None:
    """Of each kind more than a tile, with a threshold among equal values."""
    n = 1500  # beyond DIRECT: with the coarse histogram
    scores = {
        "normal": torch.randn(n),
        "softmax": torch.randn(n).mul(3).softmax(0),
        "special": SPECIAL[torch.randint(len(SPECIAL), (n,))],
        "equal": torch.full((n,), 0.25),
        "few": torch.randint(0, 4, (n,)) / 4,
    }[kind]
    check(kernel, [scores, scores.flip(0)[:700]], [n // 3, 350], device)


@settings(max_examples=6)
@given(st.data())
def test_any_ragged_batch(kernel: Any, device: torch.device, data: Any) -> None:
    counts = data.draw(st.lists(st.sampled_from([0, 1, 2, 7, 16, 64, 255, 257]), min_size=1, max_size=3))
    keep = [data.draw(st.integers(0, n)) for n in counts]
    torch.manual_seed(data.draw(st.integers(0, 99)))
    values = data.draw(st.sampled_from(["normal", "special"]))
    scores = [torch.randn(n) if values == "normal" else SPECIAL[torch.randint(len(SPECIAL), (n,))] for n in counts]
    texts, gaps = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 5))
    check(kernel, scores, keep, device, texts=texts + 1, gaps=gaps)


@pytest.mark.parametrize("keep", [0, 1, 299, 300])
def test_all_none_and_the_edges(kernel: Any, device: torch.device, keep: int) -> None:
    check(kernel, [torch.randn(300), torch.randn(2)], [keep, 1], device)


def test_texts_beyond_everything_and_no_texts(kernel: Any, device: torch.device) -> None:
    """Texts may lie beyond the rows the query sees, and a sample may have none."""
    candidates = rows_of([torch.arange(2, 6), torch.arange(3)], device)
    texts = rows_of([torch.tensor([0, 7, 900]), torch.tensor([], dtype=torch.int64)], device)
    scores = torch.tensor([[1.0, 3.0, 2.0, 0.0], [1.0, 1.0, 1.0, 5.0]], device=device)
    segments = Segments((0, 6), (6, 3), (4, 3), (3, 0), (2, 2))
    same(kernel.select(scores, candidates, texts, segments), reference.select(scores, candidates, texts, segments))


def test_scratch_is_reused_after_larger_and_smaller_decisions(kernel: Any, device: torch.device) -> None:
    """Counters and histogram come back to zero, and stale keys do not matter."""
    for n in (1300, 40, 1200):
        check(kernel, [torch.rand(n)], [n // 2], device)


def test_other_dtypes_and_strides(kernel: Any, device: torch.device) -> None:
    scores = torch.randn(2, 2, 50).bfloat16().to(device)[:, 1]
    rows = torch.arange(50, device=device).expand(2, 50)
    texts = torch.empty(2, 0, dtype=torch.int64, device=device)
    segments = Segments((0, 0), (50, 50), (50, 50), (0, 0), (20, 10))
    same(kernel.select(scores, rows, texts, segments), reference.select(scores, rows, texts, segments))


def test_counts_are_uploaded_once(kernel: Any, device: torch.device) -> None:
    from reroute_kernels.triton_kernels._common import device_counts

    first, again = (Segments((0,), (9,), (5,), (4,), (2,)) for _ in range(2))
    assert device_counts(first, device) is device_counts(again, device)
