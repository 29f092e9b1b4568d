"""The routing step of real models: shapes, the arguments of every operation, and the operations themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Backend
from ..metadata import SelectMetadata
from ..pool import Lease, PagedPool
from ..reference import AttentionSpec, RMSNorm, RopeTables, SelectRows

__all__ = [
    "BATCHES",
    "MODELS",
    "OPERATIONS",
    "PAGE",
    "TEXT",
    "VISUAL",
    "KernelCase",
    "KernelInputs",
    "KernelShape",
    "kernel_cases",
]

PAGE = 64
TEXT = 60
VISUAL = (576, 2304, 2880, 16384, 65536)
BATCHES = (1, 4, 16, 64)


@dataclass(frozen=True)
class KernelShape:
    """H query heads and G key/value heads of D features, C hidden features."""

    heads: int
    kv_heads: int
    hidden: int
    head_dim: int = 128


MODELS = {
    "LLaVA-1.5-7B": KernelShape(32, 32, 4096),
    "Qwen2.5-VL-7B": KernelShape(28, 4, 3584),
    "Qwen2.5-VL-72B": KernelShape(64, 8, 8192),
}


@dataclass(frozen=True)
class KernelCase:
    """One decision for ``batch`` prompts of ``visual`` + 60 tokens, of which a third of the visual ones are kept."""

    model: str
    visual: int
    batch: int = 1

    def __str__(self) -> str:
        """For tables and test ids."""
        return f"{self.model} N={self.visual} B={self.batch}"

    @property
    def shape(self) -> KernelShape:
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
        """Bytes of the inputs and results, roughly: pool, keys, aux and logits; compact rows in and out."""
        shape, rows = self.shape, self.pages * PAGE
        lease = shape.hidden + shape.kv_heads * shape.head_dim + 2 * shape.head_dim
        compact = 2 * self.batch * self.width * shape.hidden
        return (rows * lease + compact) * itemsize + 4 * rows * shape.heads


def kernel_cases(limit: int, itemsize: int) -> list[KernelCase]:
    """Every model, N and batch whose tensors take at most ``limit`` bytes."""
    every = [KernelCase(model, visual, batch) for model in MODELS for visual in VISUAL for batch in BATCHES]
    return [case for case in every if case.memory(itemsize) <= limit]


class KernelInputs:
    """The tensors of a case. The visual tokens come first; the values are random."""

    def __init__(self, case: KernelCase, device: torch.device, dtype: torch.dtype) -> None:
        """Lease a pool of its own; what only some operations need is made when they first ask."""
        self.case, self.device, self.dtype = case, device, dtype
        shape, batch, visual, length, kept = case.shape, case.batch, case.visual, case.length, case.kept
        self._random = torch.Generator(device).manual_seed(0)
        self.lease: Lease = PagedPool(shape.hidden, dtype, device, page_size=PAGE).lease((length,) * batch)
        rows, self.starts = self.lease.num_rows, torch.tensor(self.lease.starts, device=device)[:, None]
        self.local = torch.arange(length, device=device).repeat(batch, 1)
        counts = (length,) * batch, (visual,) * batch, (TEXT,) * batch, (kept,) * batch
        metadata = SelectMetadata(self.lease.starts, *counts)
        self.positions = torch.arange(rows, device=device)
        self.select_rows = SelectRows(
            self.local[:, :visual].contiguous(),
            self.local[:, visual:].contiguous(),
            self.positions,
            replace(metadata, on_device=metadata.counts(device)),
        )
        angles = self._draw(rows, shape.head_dim // 2).repeat(1, 2)  # each at both places of its pair
        self.tables = RopeTables(angles.cos(), angles.sin(), self.starts[:, 0] + length - 1)
        self.ids = self.positions.unsqueeze(1)

    @cached_property
    def query(self) -> Tensor:
        """(B, H, D)."""
        return self._draw(self.case.batch, self.case.shape.heads, self.case.shape.head_dim)

    @cached_property
    def keys(self) -> Tensor:
        """Of all lease rows, (rows, G, D)."""
        return self._draw(self.lease.num_rows, self.case.shape.kv_heads, self.case.shape.head_dim)

    @cached_property
    def scores(self) -> Tensor:
        """(B, N) fp32, as of any ranker."""
        return torch.rand(self.case.batch, self.case.visual, generator=self._random, device=self.device)

    @cached_property
    def states(self) -> Tensor:
        """Of all lease rows, (rows, C), at acute angles as those of a model are."""
        return self._draw(self.lease.num_rows, self.case.shape.hidden) + 1

    @cached_property
    def active(self) -> Tensor:
        """Lease rows of a random selection."""
        order = torch.rand(self.select_rows.candidates.shape, generator=self._random, device=self.device).argsort(1)
        picked = order[:, : self.case.kept].sort(1).values
        return torch.cat((picked, self.select_rows.text_rows), 1) + self.starts

    @cached_property
    def inverse(self) -> Tensor:
        """Where lease rows are in the flattened ``active``."""
        flat = self.active.flatten()
        return torch.full_like(self.positions, -1).index_copy_(0, flat, torch.arange(len(flat), device=self.device))

    @cached_property
    def norm(self) -> RMSNorm:
        """Of C features."""
        return RMSNorm(self._draw(self.case.shape.hidden), 1e-6)

    @cached_property
    def hidden(self) -> Tensor:
        """The compact rows that ran, (B, S, C)."""
        return self._draw(self.case.batch, self.case.width, self.case.shape.hidden)

    def _draw(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._random, device=self.device, dtype=self.dtype)


def _defer(backend: Backend, inputs: KernelInputs) -> Any:
    return backend.defer(inputs.lease.pages, inputs.lease.table, inputs.active, inputs.hidden)


def _admit(backend: Backend, inputs: KernelInputs) -> Any:
    return _admitted(backend, inputs, inputs.active)


def _defer_rmsnorm(backend: Backend, inputs: KernelInputs) -> Any:
    return backend.defer_rmsnorm(inputs.lease, inputs.active, inputs.inverse, inputs.hidden, inputs.norm)


def _restore(backend: Backend, inputs: KernelInputs) -> Any:
    return backend.admit(inputs.lease.pages, inputs.lease.table, inputs.local + inputs.starts)


def _select(backend: Backend, inputs: KernelInputs) -> Any:
    return backend.select(inputs.scores, inputs.select_rows)


def _score_topk(backend: Backend, inputs: KernelInputs) -> Any:
    spec = AttentionSpec(inputs.case.shape.head_dim**-0.5)
    return backend.score_topk(inputs.query, inputs.keys, inputs.tables, inputs.select_rows, spec)


def _diverse_topk(backend: Backend, inputs: KernelInputs) -> Any:
    return backend.diverse_topk(inputs.states, inputs.select_rows)


def _step(backend: Backend, inputs: KernelInputs) -> Any:
    """A whole stage boundary, without the model's own projection."""
    _defer_rmsnorm(backend, inputs)
    return _admitted(backend, inputs, _score_topk(backend, inputs).active_rows)


def _admitted(backend: Backend, inputs: KernelInputs, rows: Tensor) -> Any:
    cos, sin, _ = inputs.tables
    return backend.admit(inputs.lease.pages, inputs.lease.table, rows, cos, sin, inputs.ids)


Operation = Callable[[Backend, KernelInputs], Any]
OPERATIONS: dict[str, Operation] = {
    "defer": _defer,
    "admit": _admit,
    "restore": _restore,
    "defer_rmsnorm": _defer_rmsnorm,
    "select": _select,
    "score_topk": _score_topk,
    "diverse_topk": _diverse_topk,
    "step": _step,
}
"""The kernels, and the whole routing step: defer_rmsnorm, score_topk, admit."""
