"""The launches whose machine code is inspected and budgeted, every kernel at shapes of real models; and small ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..metadata import SelectMetadata
from ..reference import AttentionSpec, RMSNorm, RopeTables, SelectRows
from . import defer_rmsnorm, diverse, rows, score, select


@dataclass(frozen=True)
class Case:
    """A name, and a call of a launcher with tensors on the default device that launches one or more kernels."""

    name: str
    launch: Callable[[], object]


def _moved(features: int, rot: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Pages, table, rows, hidden, cos, sin and position ids of a compact sequence of 64 rows."""
    empty = torch.empty
    return (
        empty(4, 64, features, dtype=dtype),
        torch.arange(4),
        torch.arange(64)[None],
        empty(1, 64, features, dtype=dtype),
        empty(256, rot, dtype=dtype),
        empty(256, rot, dtype=dtype),
        torch.zeros(256, 1, dtype=torch.int64),
    )


def _defer(features: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[], object]:
    return lambda: rows.defer(*_moved(features, 128, dtype)[:4])


def _admit(features: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[], object]:
    def launch() -> object:
        pages, table, index, _, *aux = _moved(features, 128, dtype)
        return rows.admit(pages, table, index, aux)

    return launch


def _restore(features: int) -> Callable[[], object]:
    def launch() -> object:
        pages, table, index, *_ = _moved(features, 128, torch.bfloat16)
        return rows.admit(pages, table, index, [])

    return launch


def _defer_rmsnorm(features: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[], object]:
    def launch() -> object:
        pages, table, _, hidden, *_ = _moved(features, 0, dtype)
        inverse = torch.arange(table.numel() * pages.shape[1])
        weight = torch.empty(features, dtype=dtype)
        return defer_rmsnorm.defer_rmsnorm(pages, table, inverse, hidden, weight, 1e-6)

    return launch


def _score_topk(
    heads: int,
    groups: int,
    visual: int,
    features: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    *,
    normed: bool = False,
) -> Callable[[], object]:
    """Of one sample with ``visual`` candidates and 64 text rows: score, with a key norm or without, then select."""

    def launch() -> object:
        length = visual + 64
        row = torch.arange(length)[None]
        metadata = SelectMetadata((0,), (length,), (visual,), (64,), (visual // 4,))
        cos, sin = (torch.empty(length, features, dtype=dtype) for _ in range(2))
        return score.score_topk(
            torch.empty(1, heads, features, dtype=dtype),
            torch.empty(length, groups, features, dtype=dtype),
            RopeTables(cos, sin, row[0, -1:]),
            SelectRows(row[:, :visual], row[:, visual:], row[0], metadata),
            AttentionSpec(1.0, key_norm=RMSNorm(torch.empty(features, dtype=dtype), 1e-6) if normed else None),
        )

    return launch


def _select(visual: int, *, static: bool = False) -> Callable[[], object]:
    """Of one sample with ``visual`` candidates and 64 text rows, by scores of any method; ``static``: or fewer."""

    def launch() -> object:
        row = torch.arange(visual + 64)[None]
        columns = (0,), (visual + 64,), (visual,), (64,), (visual // 4,)
        metadata = SelectMetadata(*columns)
        if static:
            metadata = SelectMetadata(*columns, on_device=torch.tensor(columns), static_length=visual)
        rows = SelectRows(row[:, :visual], row[:, visual:], row[0], metadata)
        return select.select(torch.empty(1, visual), rows)

    return launch


def _diversity(visual: int, features: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[], object]:
    """Of one sample with ``visual`` candidates and 64 text rows, two of which are picked."""

    def launch() -> object:
        row = torch.arange(visual + 64)[None]
        metadata = SelectMetadata((0,), (visual + 64,), (visual,), (64,), (2,))
        rows = SelectRows(row[:, :visual], row[:, visual:], row[0], metadata)
        states = torch.empty(visual + 64, features, dtype=dtype)
        return diverse.diversity_scores(states, rows, metadata.counts(states.device))

    return launch


CASES = (
    Case("defer, 7B bf16", _defer(3584)),
    Case("defer, 7B fp32", _defer(3584, torch.float32)),
    Case("admit, 7B bf16", _admit(3584)),
    Case("admit, 7B fp32", _admit(3584, torch.float32)),
    Case("restore, 7B bf16", _restore(3584)),
    Case("defer_rmsnorm, 7B bf16", _defer_rmsnorm(3584)),
    Case("defer_rmsnorm, 72B bf16", _defer_rmsnorm(8192)),
    Case("defer_rmsnorm, 7B fp32", _defer_rmsnorm(3584, torch.float32)),
    Case("score_topk, Qwen 7B, 576", _score_topk(28, 4, 576)),
    Case("score_topk, LLaVA 7B, 576", _score_topk(32, 32, 576)),
    Case("score_topk, Qwen 7B, 2304", _score_topk(28, 4, 2304)),
    Case("score_topk, Qwen 7B, 16384", _score_topk(28, 4, 16384)),
    Case("score_topk, Qwen 7B fp32", _score_topk(28, 4, 576, dtype=torch.float32)),
    Case("score_topk, Qwen3 8B", _score_topk(32, 8, 576, normed=True)),
    Case("score_topk, 80 features", _score_topk(16, 16, 576, 80)),
    Case("score_topk, 256 features", _score_topk(8, 4, 576, 256)),
    Case("select, 576", _select(576)),
    Case("select, 16384", _select(16384)),
    Case("select, at most 576", _select(576, static=True)),
    Case("select, at most 16384", _select(16384, static=True)),
    Case("diversity, 7B bf16, 576", _diversity(576, 3584)),
    Case("diversity, 7B bf16, 2304", _diversity(2304, 3584)),
    Case("diversity, 72B bf16, 576", _diversity(576, 8192)),
    Case("diversity, 7B fp32, 576", _diversity(576, 3584, torch.float32)),
)

# Every kernel once, of those variants that use most of Triton's language one that compiles quickly.
SMALLEST = (
    Case("defer", _defer(16)),
    Case("admit", _admit(16)),
    Case("defer_rmsnorm", _defer_rmsnorm(16)),
    Case("diversity", _diversity(16, 16)),
    Case("score_topk", _score_topk(1, 1, select.MAX_ONE_PROGRAM + 1, 16, normed=True)),
)
