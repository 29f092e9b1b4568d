"""The five operations as PyTorch operators, on every executor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.clock import captured
from reroute_kernels import (
    AttentionSpec,
    PagedPool,
    RMSNorm,
    RopeTables,
    Selection,
    SelectMetadata,
    SelectRows,
    reference,
)

HEADS, GROUPS, FEATURES = 4, 2, 16


@pytest.fixture(scope="module")
def ops(executor: Any) -> Any:
    from reroute_kernels import ops

    return ops


class Problem:
    """Two prompts in a pool, of which the second has no candidates."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(0)
        random = lambda *shape: torch.randn(*shape, device=device)
        integers = lambda *values: torch.tensor(values, device=device)
        self.pages, self.table = random(5, 8, 16), integers(4, 0, 2)
        self.rows = integers([0, 1, 2, 3, 12, 13], [-1, -1, -1, 16, 17, 18])
        angles = random(24, FEATURES // 2).repeat(1, 2)  # each at both places of its pair
        self.hidden, self.cos, self.sin = random(2, 6, 16), angles.cos(), angles.sin()
        self.query, self.keys = random(2, HEADS, FEATURES), random(24, GROUPS, FEATURES)
        self.tables = RopeTables(self.cos, self.sin, integers(13, 18))
        columns = (0, 16), (14, 3), (10, 0), (4, 3), (3, 0)
        self.rows_to_select = SelectRows(
            integers([*range(2, 12)], [-1] * 10),
            integers([0, 1, 12, 13], [0, 1, 2, -1]),
            torch.arange(24, device=device) * 3,
            SelectMetadata(*columns, on_device=integers(*columns)),  # as a plan does: a capture uploads nothing
        )
        self.scores = random(2, 10)

    @property
    def scored(self) -> tuple[Any, ...]:
        return self.query, self.keys, self.tables, self.rows_to_select

    @property
    def inverse(self) -> Tensor:
        rows = self.rows.flatten()
        inverse = torch.full((24,), -1, device=rows.device)
        inverse[rows[rows >= 0]] = torch.arange(12, device=rows.device)[rows >= 0]
        return inverse

    @property
    def lists(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows_to_select[:3]

    @property
    def counts(self) -> tuple[Tensor, list[int]]:
        counts = self.rows_to_select.metadata.counts(self.pages.device)
        return counts, counts.flatten().tolist()

    def step(self, operations: Any, pages: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        """A stage boundary; ``pages`` changes."""
        operations.defer(pages, self.table, self.rows, hidden * 2)
        selection = operations.score_topk(*self.scored, AttentionSpec(0.25))
        again = operations.select(selection.scores, self.rows_to_select)
        return *operations.admit(pages, self.table, selection.active_rows, self.cos, self.rows.new_ones(24, 1)), *again


def same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_stage_boundary_equals_the_reference(ops: Any, device: torch.device) -> None:
    problem = Problem(device)
    pages, expected = problem.pages.clone(), problem.pages.clone()
    same(problem.step(ops, pages, problem.hidden), problem.step(reference, expected, problem.hidden))
    assert torch.equal(pages, expected)


def test_a_key_norm_reaches_the_kernel(ops: Any, device: torch.device) -> None:
    problem = Problem(device)
    norm = RMSNorm(torch.rand(FEATURES, device=device), 1e-6)
    spec = AttentionSpec(0.25, key_norm=norm)
    results = (backend.score_topk(*problem.scored, spec) for backend in (ops, reference))
    same(*results)


def test_under_compile(ops: Any, device: torch.device) -> None:
    problem = Problem(device)
    pages, expected = problem.pages.clone(), problem.pages.clone()
    compiled = torch.compile(problem.step, backend="aot_eager", fullgraph=True)
    same(compiled(ops, pages, problem.hidden), problem.step(reference, expected, problem.hidden))
    assert torch.equal(pages, expected)


def test_opcheck(ops: Any, device: torch.device) -> None:
    p, registered = Problem(device), torch.ops.reroute_kernels
    index = (p.pages, p.table, p.rows)
    torch.library.opcheck(registered.defer, (*index, p.hidden))
    torch.library.opcheck(registered.defer, (*index, p.hidden.requires_grad_()))
    torch.library.opcheck(registered.admit, (*index, [p.cos, p.sin, p.rows.new_ones(24, 1)]))
    norm = torch.ones(16, device=device), 1e-6
    torch.library.opcheck(registered.defer_rmsnorm, (p.pages, p.table, p.inverse, p.hidden, *norm))
    torch.library.opcheck(registered.select, (p.scores, *p.lists, *p.counts))
    torch.library.opcheck(
        registered.score_topk, (p.query, p.keys, *p.tables, *p.lists, *p.counts, 0.25, "half", None, 0.0)
    )
    norm = torch.ones(FEATURES, device=device), 1e-6
    torch.library.opcheck(registered.score_topk, (p.query, p.keys, *p.tables, *p.lists, *p.counts, 0.25, "half", *norm))


def test_no_autograd_history(ops: Any, device: torch.device) -> None:
    p = Problem(device)
    for tensor in (p.hidden, p.cos, p.query, p.keys, p.scores):
        tensor.requires_grad_()
    outputs = p.step(ops, p.pages, p.hidden)
    assert not any(t.requires_grad for t in (p.pages, *outputs))


def test_flops(ops: Any, device: torch.device) -> None:
    p = Problem(device)
    with FlopCounterMode(display=False) as counter:
        p.step(ops, p.pages, p.hidden)
    assert counter.get_total_flops() == 2 * HEADS * FEATURES * 14  # the logits of the sample that has candidates


def test_fake_tensors_read_no_value(ops: Any, executor: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    if executor.kind != "interpreter":
        pytest.skip("fakes are the same everywhere")
    with FakeTensorMode():
        problem = Problem(torch.device("cpu"))
        with PagedPool(16, torch.float32, "cpu", page_size=8).lease([14, 3]) as lease:
            hidden, cos, _, *selection = problem.step(ops, lease.pages, problem.hidden)
            kept, active, positions, inverse, scores = Selection(*selection)
            rows = lease.table.new_empty(2, 6), lease.table.new_empty(lease.num_rows)
            normed = ops.defer_rmsnorm(lease, *rows, problem.hidden, RMSNorm(torch.ones(16), 1e-6))
    assert (hidden.shape, cos.shape) == ((2, 7, 16), (2, 7, FEATURES))
    assert normed.shape == (lease.num_rows, 16)
    assert (kept.shape, active.shape, positions.shape, scores.shape) == ((2, 3), (2, 7), (2, 7), (2, 10))
    assert inverse.shape == (24,)


def test_cuda_graph(ops: Any, executor: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU nothing is captured, but neither is anything uploaded."""
    problem = Problem(device)
    run = lambda: problem.step(ops, problem.pages, problem.hidden)
    if executor.kind == "cuda":
        run = captured(run)
    else:
        monkeypatch.setattr(reference, "upload", None)
    problem.hidden.normal_()
    problem.keys.normal_()
    same(run(), problem.step(reference, problem.pages.clone(), problem.hidden))


def test_launches_go_to_the_gpu_of_the_tensors(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a model on the second GPU, while the first is the current one."""
    current = [0]

    @contextmanager
    def use(device: torch.device) -> Iterator[None]:
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", use)
    launch = ops._where_its_tensors_are(lambda tensor, other: (current[-1], other))
    for place, wanted in (("cuda:1", 1), ("cuda:0", 0), ("cpu", 0)):
        assert launch(SimpleNamespace(device=torch.device(place)), "other") == (wanted, "other")
