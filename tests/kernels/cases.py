"""What the kernels are run on, as a prefill would hand it to them, and how results compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import pytest
import torch
from tensors import padded
from torch import Tensor

from reroute_kernels import AttentionSpec, Rope, RopeTables, Selection, SelectMetadata, SelectRows, reference

PAGE = 64


def split(length: int, candidates: int, *, gaps: int = 0) -> tuple[Tensor, Tensor]:
    """Random disjoint ascending candidates (the last row is not one) and texts; ``gaps`` rows are neither."""
    order = torch.randperm(max(length - 1, 0))
    chosen = order[:candidates]
    texts = torch.cat((order[candidates + gaps :], torch.tensor([length - 1] if length else [], dtype=torch.int64)))
    return chosen.sort().values, texts.sort().values


@dataclass(frozen=True)
class ScoreShape:
    """Of a model's attention: H query heads and G key/value heads of D features, of which the first are rotated."""

    num_qo_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    rotary_dim: int | None = None  # all of them
    rope: Rope = "half"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        """For test ids."""
        return "-".join(str(getattr(self, field.name)).removeprefix("torch.") for field in fields(self))


class ScoreInputs(NamedTuple):
    """Arguments of ``score_topk``."""

    query: Tensor
    keys: Tensor
    tables: RopeTables
    rows: SelectRows
    spec: AttentionSpec


@dataclass(frozen=True)
class ScoreCase:
    """One decision of a ragged batch, from the attention of random queries.

    lengths, num_candidates, k: of each sample. table_dtype: of cos and sin, else that of the shape. gaps: rows of each
    sample that are neither candidate nor text. poison: what the tails of pages hold.
    """

    lengths: Sequence[int]
    num_candidates: Sequence[int]
    k: Sequence[int]
    shape: ScoreShape = ScoreShape()
    table_dtype: torch.dtype | None = None
    gaps: int = 0
    poison: float = 0.0

    def inputs(self, device: torch.device) -> ScoreInputs:
        """New values. Samples start on pages of their own."""
        shape, lengths, batch = self.shape, self.lengths, len(self.lengths)
        rotary_dim = shape.head_dim if shape.rotary_dim is None else shape.rotary_dim
        pages = [-(-length // PAGE) for length in lengths]
        starts = [PAGE * sum(pages[:b]) for b in range(batch)]
        total = max(PAGE * sum(pages), 1)
        keys = torch.full((total, shape.num_kv_heads, shape.head_dim), self.poison)
        angles = torch.full((total, rotary_dim // 2), self.poison)
        for start, length in zip(starts, lengths, strict=True):
            keys[start : start + length] = torch.randn(length, shape.num_kv_heads, shape.head_dim)
            angles[start : start + length] = torch.randn(length, rotary_dim // 2) * 3
        query = torch.randn(batch, shape.num_qo_heads, shape.head_dim) * 2
        both = angles.repeat_interleave(2, -1) if shape.rope == "interleaved" else angles.repeat(1, 2)
        cos, sin = (t.to(self.table_dtype or shape.dtype).to(device) for t in (both.cos(), both.sin()))
        # The query's own row is the last one in a prefill; no kernel may take that for granted.
        last = torch.tensor([s + int(torch.randint(max(n, 1), ())) for s, n in zip(starts, lengths, strict=True)])
        parts = [split(length, n, gaps=self.gaps) for length, n in zip(lengths, self.num_candidates, strict=True)]
        candidates, texts = (padded([part[i] for part in parts], device=device) for i in (0, 1))
        counts = starts, lengths, self.num_candidates, [len(t) for _, t in parts], self.k
        return ScoreInputs(
            query.to(shape.dtype).to(device),
            keys.to(shape.dtype).to(device),
            RopeTables(cos, sin, last.to(device)),
            SelectRows(candidates, texts, torch.arange(total, device=device) % 97, SelectMetadata(*map(tuple, counts))),
            AttentionSpec(shape.head_dim**-0.5, shape.rope),
        )


class StageBoundary:
    """Two prompts in a pool, of which the second has no candidates. Every tensor is made on its device."""

    num_qo_heads, num_kv_heads, head_dim = 4, 2, 16

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(0)
        random: Callable[..., Tensor] = lambda *shape: torch.randn(*shape, device=device)
        integers: Callable[..., Tensor] = lambda *values: torch.tensor(values, device=device)
        self.pages, self.table = random(5, 8, 16), integers(4, 0, 2)
        self.rows = integers([0, 1, 2, 3, 12, 13], [-1, -1, -1, 16, 17, 18])
        angles = random(24, self.head_dim // 2).repeat(1, 2)  # each at both places of its pair
        self.hidden, self.cos, self.sin = random(2, 6, 16), angles.cos(), angles.sin()
        self.query, self.keys = (
            random(2, self.num_qo_heads, self.head_dim),
            random(24, self.num_kv_heads, self.head_dim),
        )
        self.tables = RopeTables(self.cos, self.sin, integers(13, 18))
        columns = (0, 16), (14, 3), (10, 0), (4, 3), (3, 0)
        self.select_rows = SelectRows(
            integers([*range(2, 12)], [-1] * 10),
            integers([0, 1, 12, 13], [0, 1, 2, -1]),
            torch.arange(24, device=device) * 3,
            SelectMetadata(*columns, on_device=integers(*columns)),  # as a plan does: a capture uploads nothing
        )
        self.scores, self.states = random(2, 10), random(24, 16)

    @property
    def inverse(self) -> Tensor:
        rows = self.rows.flatten()
        inverse = torch.full((24,), -1, device=rows.device)
        inverse[rows[rows >= 0]] = torch.arange(12, device=rows.device)[rows >= 0]
        return inverse

    @property
    def flat_rows(self) -> tuple[Any, ...]:
        """``select_rows`` as operators take them."""
        *lists, metadata = self.select_rows
        return *lists, metadata.counts(self.pages.device), list(metadata.flat), metadata.static_length

    def step(self, operations: Any, pages: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        """A stage boundary; ``pages`` changes."""
        operations.defer(pages, self.table, self.rows, hidden * 2)
        selection = operations.score_topk(self.query, self.keys, self.tables, self.select_rows, AttentionSpec(0.25))
        again = operations.select(selection.scores, self.select_rows)
        diverse = operations.diverse_topk(self.states, self.select_rows)
        admitted = operations.admit(pages, self.table, selection.active_rows, self.cos, self.rows.new_ones(24, 1))
        return *admitted, *again, *diverse


def make_rows_long(select: Any, patch: pytest.MonkeyPatch, crowd: int) -> None:
    """Rows of any length are selected from in phases, in chunks of 128 candidates; more than ``crowd`` keys in the
    bucket of the pivot are refined. select: the module.
    """
    for name, value in (("BLOCK_N", 64), ("MAX_ONE_PROGRAM", 0), ("CHUNK", 128), ("MAX_BUCKET_KEYS", crowd)):
        patch.setattr(select, name, value)


def gibibytes(executor: Any, count: int, dtype: torch.dtype) -> Tensor:
    """New memory of ``count`` elements. It is not poisoned: what a test never touches costs nothing but addresses."""
    if executor.kind == "simt":
        pytest.skip("simt makes a copy of all that a tensor spans")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        return torch.empty(count, dtype=dtype, device=executor.device)


def num_compiled(executor: Any, *kernels: Any) -> int:
    """How many variants of these kernels were compiled so far."""
    if executor.kind == "interpreter":
        pytest.skip("the interpreter compiles nothing")
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


def same(got: Selection, wanted: Selection) -> None:
    """Equal to the bit, NaN payloads included."""
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        a, b = (t.view(torch.int32) if t.dtype == torch.float32 else t for t in (a, b))
        assert torch.equal(a, b)


def exact(rows: SelectRows, got: Selection) -> None:
    """The selection is that of a stable sort of the kernel's own scores."""
    same(got, reference.select(got.scores, rows))
