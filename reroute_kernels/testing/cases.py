"""The routing step of real models: their shapes, and the arguments of every operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from reroute_kernels import Backend, Lease, PagedPool, RMSNorm, SelectMetadata

__all__ = ["BATCHES", "MODELS", "OPERATIONS", "PAGE", "TEXT", "VISUAL", "Case", "Problem", "Shape", "problems"]

PAGE = 64
TEXT = 60
VISUAL = (576, 2304, 2880, 16384, 65536)
BATCHES = (1, 4, 16, 64)


@dataclass(frozen=True)
class Shape:
    """H query heads and G key heads of D features, C hidden features."""

    heads: int
    kv_heads: int
    hidden: int
    features: int = 128


MODELS = {
    "LLaVA-1.5-7B": Shape(32, 32, 4096),
    "Qwen2.5-VL-7B": Shape(28, 4, 3584),
    "Qwen2.5-VL-72B": Shape(64, 8, 8192),
}


@dataclass(frozen=True)
class Problem:
    """One decision for ``batch`` prompts of ``visual`` + 60 tokens, of which a third of the visual ones are kept."""

    model: str
    visual: int
    batch: int = 1

    def __str__(self) -> str:
        """For tables and test ids."""
        return f"{self.model} N={self.visual} B={self.batch}"

    @property
    def shape(self) -> Shape:
        """Of the model."""
        return MODELS[self.model]

    @property
    def length(self) -> int:
        """Prompt length L."""
        return self.visual + TEXT

    @property
    def kept(self) -> int:
        """Visual tokens kept, K."""
        return self.visual // 3

    @property
    def width(self) -> int:
        """Compact length S."""
        return self.kept + TEXT

    @property
    def pages(self) -> int:
        """Pages of all prompts."""
        return self.batch * -(-self.length // PAGE)

    def memory(self, itemsize: int) -> int:
        """Bytes of a case, roughly: pool, keys, aux and logits; compact rows in and out."""
        shape, rows = self.shape, self.pages * PAGE
        lease = shape.hidden + shape.kv_heads * shape.features + 2 * shape.features
        compact = 2 * self.batch * self.width * shape.hidden
        return (rows * lease + compact) * itemsize + 4 * rows * shape.heads


def problems(limit: int, itemsize: int) -> list[Problem]:
    """Every model, N and batch whose case takes at most ``limit`` bytes."""
    every = [Problem(model, visual, batch) for model in MODELS for visual in VISUAL for batch in BATCHES]
    return [problem for problem in every if problem.memory(itemsize) <= limit]


class Case:
    """The tensors of a problem. The visual tokens come first; the values are random."""

    def __init__(self, problem: Problem, device: torch.device, dtype: torch.dtype) -> None:
        self.problem, self.device, self.dtype = problem, device, dtype
        shape, batch, visual, length, kept = (
            problem.shape,
            problem.batch,
            problem.visual,
            problem.length,
            problem.kept,
        )
        self._random = torch.Generator(device).manual_seed(0)
        self.lease: Lease = PagedPool(shape.hidden, dtype, device, page_size=PAGE).lease((length,) * batch)
        rows, self.starts = self.lease.num_rows, torch.tensor(self.lease.starts, device=device)[:, None]
        self.local = torch.arange(length, device=device).repeat(batch, 1)
        self.candidates, self.texts = self.local[:, :visual].contiguous(), self.local[:, visual:].contiguous()
        counts = (length,) * batch, (visual,) * batch, (TEXT,) * batch, (kept,) * batch
        metadata = SelectMetadata(self.lease.starts, *counts)
        self.metadata = replace(metadata, on_device=metadata.counts(device))
        self.query_rows = self.starts[:, 0] + length - 1
        angles = self._draw(rows, shape.features // 2).repeat(1, 2)  # each at both places of its pair
        self.cos, self.sin = angles.cos(), angles.sin()
        self.positions = torch.arange(rows, device=device)
        self.ids = self.positions.unsqueeze(1)

    # What only some operations need is made when they first ask.

    @cached_property
    def query(self) -> Tensor:
        return self._draw(self.problem.batch, self.problem.shape.heads, self.problem.shape.features)

    @cached_property
    def keys(self) -> Tensor:
        return self._draw(self.lease.num_rows, self.problem.shape.kv_heads, self.problem.shape.features)

    @cached_property
    def scores(self) -> Tensor:
        return torch.rand(self.problem.batch, self.problem.visual, generator=self._random, device=self.device)

    @cached_property
    def active(self) -> Tensor:
        """Lease rows of a random selection."""
        order = torch.rand(self.candidates.shape, generator=self._random, device=self.device).argsort(1)
        picked = order[:, : self.problem.kept].sort(1).values
        return torch.cat((picked, self.texts), 1) + self.starts

    @cached_property
    def inverse(self) -> Tensor:
        """Where lease rows are in the flattened ``active``."""
        flat = self.active.flatten()
        return torch.full_like(self.positions, -1).index_copy_(0, flat, torch.arange(len(flat), device=self.device))

    @cached_property
    def norm(self) -> RMSNorm:
        return RMSNorm(self._draw(self.problem.shape.hidden), 1e-6)

    @cached_property
    def hidden(self) -> Tensor:
        return self._draw(self.problem.batch, self.problem.width, self.problem.shape.hidden)

    def _draw(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._random, device=self.device, dtype=self.dtype)


def _defer(backend: Backend, case: Case) -> Any:
    return backend.defer(case.lease.pages, case.lease.table, case.active, case.hidden)


def _admit(backend: Backend, case: Case) -> Any:
    return backend.admit(case.lease.pages, case.lease.table, case.active, case.cos, case.sin, case.ids)


def _defer_rmsnorm(backend: Backend, case: Case) -> Any:
    return backend.defer_rmsnorm(case.lease, case.active, case.inverse, case.hidden, case.norm)


def _restore(backend: Backend, case: Case) -> Any:
    return backend.admit(case.lease.pages, case.lease.table, case.local + case.starts)


def _select(backend: Backend, case: Case) -> Any:
    return backend.select(case.scores, case.candidates, case.texts, case.positions, case.metadata)


def _score_topk(backend: Backend, case: Case) -> Any:
    indices = case.query_rows, case.candidates, case.texts, case.positions, case.metadata
    return backend.score_topk(
        case.query, case.keys, case.cos, case.sin, *indices, scale=case.problem.shape.features**-0.5
    )


def _step(backend: Backend, case: Case) -> Any:
    """A whole stage boundary, without the model's own projection."""
    _defer_rmsnorm(backend, case)
    active = _score_topk(backend, case).active
    return backend.admit(case.lease.pages, case.lease.table, active, case.cos, case.sin, case.ids)


Operation = Callable[[Backend, Case], Any]
OPERATIONS: dict[str, Operation] = {
    "defer": _defer,
    "admit": _admit,
    "restore": _restore,
    "defer_rmsnorm": _defer_rmsnorm,
    "select": _select,
    "score_topk": _score_topk,
    "step": _step,
}
"""The kernels, and the whole routing step: defer_rmsnorm, score_topk, admit."""
