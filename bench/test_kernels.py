"""Micro-benchmarks of the four operations on real shapes, for every backend that runs here: ``pytest bench``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch

from reroute_kernels import Backend, BackendUnavailable, Lease, PagedPool, Segments, resolve

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
TEXT = 60


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int


SHAPES = {"llava-7b": Shape(32, 32, 128, 4096), "qwen2.5-vl-7b": Shape(28, 4, 128, 3584)}


class Case:
    """The arguments of one decision: B prompts of N visual tokens, 60 text tokens after them, a third of N kept."""

    def __init__(self, shape: Shape, visual: int, batch: int) -> None:
        length, kept = visual + TEXT, visual // 3
        random = torch.Generator(DEVICE).manual_seed(0)

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=random, device=DEVICE, dtype=DTYPE)

        self.lease: Lease = PagedPool(shape.hidden, DTYPE, DEVICE).lease((length,) * batch)
        rows, starts = self.lease.num_rows, torch.tensor(self.lease.starts, device=DEVICE)
        local = torch.arange(length, device=DEVICE).expand(batch, -1)
        self.candidates, self.texts = local[:, :visual].contiguous(), local[:, visual:].contiguous()
        self.segments = Segments(
            self.lease.starts, (length,) * batch, (visual,) * batch, (TEXT,) * batch, (kept,) * batch
        )
        self.query, self.keys = draw(batch, shape.heads, shape.head_dim), draw(rows, shape.kv_heads, shape.head_dim)
        self.query_rows = starts + length - 1
        self.cos, self.sin = draw(rows, shape.head_dim), draw(rows, shape.head_dim)
        self.ids = torch.arange(rows, device=DEVICE).unsqueeze(1)
        self.scores = torch.rand(batch, visual, generator=random, device=DEVICE)
        picked = torch.rand(batch, visual, generator=random, device=DEVICE).argsort(1)[:, :kept].sort(1).values
        self.active = torch.cat((picked, self.texts), 1) + starts.unsqueeze(1)
        self.hidden = draw(batch, kept + TEXT, shape.hidden)
        self.scale = shape.head_dim**-0.5


@lru_cache(maxsize=1)
def case_of(model: str, visual: int, batch: int) -> Case:
    return Case(SHAPES[model], visual, batch)


def defer(backend: Backend, case: Case) -> Any:
    return backend.defer(case.lease.pages, case.lease.table, case.active, case.hidden)


def admit(backend: Backend, case: Case) -> Any:
    return backend.admit(case.lease.pages, case.lease.table, case.active, case.cos, case.sin, case.ids)


def select(backend: Backend, case: Case) -> Any:
    return backend.select(case.scores, case.candidates, case.texts, case.segments)


def score_topk(backend: Backend, case: Case) -> Any:
    indices = case.query_rows, case.candidates, case.texts, case.segments
    return backend.score_topk(case.query, case.keys, case.cos, case.sin, *indices, scale=case.scale)


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    monkeypatch.delenv("REROUTE_BACKEND", raising=False)
    try:
        return resolve(request.param, DEVICE)
    except BackendUnavailable as error:
        pytest.skip(error.why)


@pytest.mark.parametrize("operation", [defer, admit, select, score_topk], ids=lambda f: f.__name__)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("visual", [576, 2304])
@pytest.mark.parametrize("model", SHAPES)
@torch.no_grad()
def test_operation(
    benchmark: Any, backend: Backend, model: str, visual: int, batch: int, operation: Callable[[Backend, Case], Any]
) -> None:
    case = case_of(model, visual, batch)
    benchmark.group = f"{operation.__name__}, {DEVICE.type}, {DTYPE}"

    def run() -> None:
        operation(backend, case)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=20, warmup_rounds=2)
