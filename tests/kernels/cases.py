"""Decisions to make, as a prefill would hand them to the score and select operations, and how results compare."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reroute_kernels import Selection, SelectMetadata, reference

PAGE = 64


def rows_of(rows: list[Tensor], device: torch.device, *, width: int = 0) -> Tensor:
    """(B, longest) int64, -1 behind each list."""
    out = torch.full((len(rows), max(width, *map(len, rows))), -1)
    for target, source in zip(out, rows, strict=True):
        target[: len(source)] = source
    return out.to(device)


def split(length: int, candidates: int, *, gaps: int = 0) -> tuple[Tensor, Tensor]:
    """Random disjoint ascending candidates (the last row is not one) and texts; ``gaps`` rows are neither."""
    order = torch.randperm(max(length - 1, 0))
    chosen = order[:candidates]
    texts = torch.cat((order[candidates + gaps :], torch.tensor([length - 1] if length else [], dtype=torch.int64)))
    return chosen.sort().values, texts.sort().values


def decision(
    lengths: list[int],
    counts: list[int],
    keep: list[int],
    device: torch.device,
    *,
    heads: int = 4,
    groups: int = 2,
    features: int = 16,
    rot: int | None = None,
    rope: Any = "half",
    dtype: torch.dtype = torch.float32,
    table_dtype: torch.dtype | None = None,
    gaps: int = 0,
    poison: float = 0.0,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of score_topk. Samples start on pages of their own, and page tails hold ``poison``."""
    rot = features if rot is None else rot
    pages = [-(-length // PAGE) for length in lengths]
    starts = [PAGE * sum(pages[:b]) for b in range(len(pages))]
    total = max(PAGE * sum(pages), 1)
    keys = torch.full((total, groups, features), poison)
    angles = torch.full((total, rot // 2), poison)
    for start, length in zip(starts, lengths, strict=True):
        keys[start : start + length] = torch.randn(length, groups, features)
        angles[start : start + length] = torch.randn(length, rot // 2) * 3
    query = torch.randn(len(lengths), heads, features) * 2
    both = angles.repeat_interleave(2, -1) if rope == "interleaved" else angles.repeat(1, 2)
    cos, sin = (t.to(table_dtype or dtype).to(device) for t in (both.cos(), both.sin()))
    # The query's own row is the last one in a prefill; no kernel may take that for granted.
    last = torch.tensor([s + int(torch.randint(max(n, 1), ())) for s, n in zip(starts, lengths, strict=True)])
    parts = [split(length, n, gaps=gaps) for length, n in zip(lengths, counts, strict=True)]
    candidates, texts = (rows_of([part[i] for part in parts], device) for i in (0, 1))
    metadata = SelectMetadata(
        tuple(starts), tuple(lengths), tuple(counts), tuple(len(t) for _, t in parts), tuple(keep)
    )
    indices = last.to(device), candidates, texts, torch.arange(total, device=device) % 97
    tensors = (query.to(dtype).to(device), keys.to(dtype).to(device), cos, sin, *indices, metadata)
    return tensors, {"scale": features**-0.5, "rope": rope}


def make_rows_long(select: Any, patch: pytest.MonkeyPatch, crowd: int) -> None:
    """Rows of any length are selected from in stages, by programs with a share of 128 candidates each; more than
    ``crowd`` keys in the bin of the threshold are refined. select: the module.
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


def exact(arguments: tuple[Any, ...], got: Selection) -> None:
    """The selection is that of a stable sort of the kernel's own scores. arguments: those of score_topk."""
    same(got, reference.select(got.scores, *arguments[5:]))
