"""The six operations as PyTorch operators, on every executor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import StageBoundary
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from reroute_kernels import AttentionSpec, PagedPool, RMSNorm, Selection, metadata, reference
from reroute_kernels.testing.cuda_graph import captured


def assert_close(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_stage_boundary_equals_the_reference(ops: Any, device: torch.device) -> None:
    boundary = StageBoundary(device)
    pages, expected = boundary.pages.clone(), boundary.pages.clone()
    assert_close(boundary.step(ops, pages, boundary.hidden), boundary.step(reference, expected, boundary.hidden))
    assert torch.equal(pages, expected)


def test_a_key_norm_reaches_the_kernel(ops: Any, device: torch.device) -> None:
    boundary = StageBoundary(device)
    norm = RMSNorm(torch.rand(boundary.head_dim, device=device), 1e-6)
    scored = boundary.query, boundary.keys, boundary.tables, boundary.select_rows
    results = (backend.score_topk(*scored, AttentionSpec(0.25, key_norm=norm)) for backend in (ops, reference))
    assert_close(*results)


def test_under_compile(ops: Any, device: torch.device) -> None:
    boundary = StageBoundary(device)
    pages, expected = boundary.pages.clone(), boundary.pages.clone()
    compiled = torch.compile(boundary.step, backend="aot_eager", fullgraph=True)
    assert_close(compiled(ops, pages, boundary.hidden), boundary.step(reference, expected, boundary.hidden))
    assert torch.equal(pages, expected)


def test_opcheck(executor: Any, ops: Any, device: torch.device) -> None:
    """Schemas, fake kernels and dispatch keys, which are the same on every executor of CPU tensors."""
    if executor.kind == "simt":
        pytest.skip("the interpreter's operators are these")
    p, registered = StageBoundary(device), torch.ops.reroute_kernels
    index = (p.pages, p.table, p.rows)
    torch.library.opcheck(registered.defer, (*index, p.hidden))
    torch.library.opcheck(registered.defer, (*index, p.hidden.requires_grad_()))
    torch.library.opcheck(registered.admit, (*index, [p.cos, p.sin, p.rows.new_ones(24, 1)]))
    norm = torch.ones(16, device=device), 1e-6
    torch.library.opcheck(registered.defer_rmsnorm, (p.pages, p.table, p.inverse, p.hidden, *norm))
    torch.library.opcheck(registered.select, (p.scores, *p.flat_rows))
    torch.library.opcheck(registered.diverse_topk, (p.states, *p.flat_rows))
    scored = p.query, p.keys, *p.tables, *p.flat_rows
    torch.library.opcheck(registered.score_topk, (*scored, 0.25, "half", None, 0.0))
    norm = torch.ones(p.head_dim, device=device), 1e-6
    torch.library.opcheck(registered.score_topk, (*scored, 0.25, "half", *norm))


def test_no_autograd_history(ops: Any, device: torch.device) -> None:
    p = StageBoundary(device)
    for tensor in (p.hidden, p.cos, p.query, p.keys, p.scores, p.states):
        tensor.requires_grad_()
    outputs = p.step(ops, p.pages, p.hidden)
    assert not any(t.requires_grad for t in (p.pages, *outputs))


def test_flops(ops: Any, device: torch.device) -> None:
    p = StageBoundary(device)
    with FlopCounterMode(display=False) as counter:
        p.step(ops, p.pages, p.hidden)
    # Of the sample that has candidates: logits; norms, sum, centrality, and similarities to two of three picks.
    logits, diversity = 2 * p.num_qo_heads * p.head_dim * 14, 2 * 16 * 10 * (3 + 2)
    assert counter.get_total_flops() == logits + diversity


def test_fake_tensors_read_no_value(ops: Any, executor: Any) -> None:
    if executor.kind != "interpreter":
        pytest.skip("fakes are the same everywhere")
    with FakeTensorMode():
        boundary = StageBoundary(torch.device("cpu"))
        with PagedPool(16, torch.float32, "cpu", page_size=8).lease([14, 3]) as lease:
            hidden, cos, _, *selections = boundary.step(ops, lease.pages, boundary.hidden)
            kept, active, positions, inverse, scores = Selection(*selections[:5])
            assert [t.shape for t in selections[5:]] == [t.shape for t in selections[:5]]
            rows = lease.table.new_empty(2, 6), lease.table.new_empty(lease.num_rows)
            normed = ops.defer_rmsnorm(lease, *rows, boundary.hidden, RMSNorm(torch.ones(16), 1e-6))
    assert (hidden.shape, cos.shape) == ((2, 7, 16), (2, 7, boundary.head_dim))
    assert normed.shape == (lease.num_rows, 16)
    assert (kept.shape, active.shape, positions.shape, scores.shape) == ((2, 3), (2, 7), (2, 7), (2, 10))
    assert inverse.shape == (24,)


def test_fake_tensors_are_refused_like_real_ones(ops: Any, executor: Any) -> None:
    """So that what is wrong shows where it is traced."""
    if executor.kind != "interpreter":
        pytest.skip("fakes are the same everywhere")
    for mode in (nullcontext(), FakeTensorMode()):
        with mode:
            p = StageBoundary(torch.device("cpu"))
            index, inverse, norm = (p.table, p.rows), p.rows.new_zeros(24), torch.ones(16)
            lists = p.flat_rows
            wrong: tuple[tuple[Any, tuple[Any, ...]], ...] = (
                (ops.defer, (p.pages, *index, p.hidden.half())),
                (ops.defer, (p.pages.half(), *index, p.hidden)),
                (ops._admit, (p.pages.transpose(0, 1), *index, [])),
                (ops._defer_rmsnorm_op, (p.pages, p.table, inverse, p.hidden.half(), norm, 1e-6)),
                (ops._defer_rmsnorm_op, (p.pages, p.table, inverse, p.hidden, norm[:3], 1e-6)),
                (ops._diverse_op, (p.states.double(), *lists)),
                (ops._score_op, (p.query, p.keys.int(), *p.tables, *lists, 0.25, "half", None, 0.0)),
                (ops._score_op, (p.query[:, :3], p.keys, *p.tables, *lists, 0.25, "half", None, 0.0)),
                (ops._score_op, (p.query, p.keys, *p.tables, *lists, 0.25, "half", norm.int(), 1e-6)),
                (ops._score_op, (p.query, p.keys, *p.tables, *lists, 0.25, "halves", None, 0.0)),
            )
            for operation, arguments in wrong:
                with pytest.raises(ValueError, match=r"wants|takes|cannot share|unknown rope layout"):
                    operation(*arguments)
            mixed = ops._score_op(p.query, p.keys.half(), *p.tables, *lists, 0.25, "half", None, 0.0)
            assert mixed[0].shape == (2, 3)


def test_cuda_graph(ops: Any, executor: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU nothing is captured, but neither is anything uploaded."""
    boundary = StageBoundary(device)
    run: Callable[[], Any] = lambda: boundary.step(ops, boundary.pages, boundary.hidden)
    if executor.kind == "cuda":
        run = captured(run)
    else:
        monkeypatch.setattr(metadata, "upload", None)
    boundary.hidden.normal_()
    boundary.keys.normal_()
    assert_close(run(), boundary.step(reference, boundary.pages.clone(), boundary.hidden))


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
