"""Replayed prefills through the Triton kernels: on CUDA as graphs, elsewhere as tapes; against eager ones."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from tape_recorder import record_on_tapes

import reroute
from reroute.rankers import Diversity, LastTokenAttention, Ranker
from reroute_kernels import Backend
from reroute_kernels.recorder import CudaRecorder

DECISIONS = (
    (LastTokenAttention(), "remove"),
    (LastTokenAttention(-1), "route"),
    (Diversity(), "route"),
)
"""One decision of each, in the pool, and one more among what it has left."""


@pytest.fixture
def backend(executor: Any, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """See test_routing.py."""
    from reroute_kernels import ops

    record_on_tapes(monkeypatch, least=8)
    return Backend.of("triton", "under test", ops)


@pytest.mark.parametrize(("ranker", "action"), DECISIONS)
@pytest.mark.parametrize("batch", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_replays(ranker: Ranker, action: Any, batch: int, backend: Backend, device: torch.device) -> None:
    """By a graph that was captured with another prompt: the same rows in the cache, logits to rounding.

    Rows of a batch are parts of tiles, and end within a page.
    """
    tiny = models.llava(layers=4, side=3)
    tiny.model.to(device)
    schedule = reroute.Schedule((1, 3), (0.5, 0.25), (ranker, LastTokenAttention()))
    seen, new = (
        {key: value.to(device) for key, value in tiny.inputs([tiny.prompt(*parts)] * batch).items()}
        for parts in ((0, 5, tiny.grid, 1, tiny.grid, 7), (1, 2, tiny.grid, 1, tiny.grid, 6))
    )
    outputs = []
    for graphs in (False, reroute.Graphs(max_waste=10)):
        with reroute.enable(tiny.model, schedule=schedule, action=action, graphs=graphs, backend="torch") as handle:
            handle.backend = backend
            for given in (seen, seen, new) if graphs else (new,):
                output = tiny.model(**given)
            outputs.append(output)
            use = handle.stats().graph
            assert (use is not None and use.is_replayed) is bool(graphs), use
    eager, replayed = outputs
    torch.testing.assert_close(replayed.logits, eager.logits, rtol=0, atol=1e-4)
    for mine, its in zip(replayed[models.CACHE].layers[1:], eager[models.CACHE].layers[1:], strict=True):
        assert torch.equal(mine.rows.key_positions, its.rows.key_positions)


@pytest.fixture
def recorder(executor: Any) -> CudaRecorder:
    """What records on a GPU."""
    if executor.kind != "cuda":
        pytest.skip("records on a GPU")
    return CudaRecorder(torch.device("cuda", torch.cuda.current_device()))


def test_a_capture_that_cuda_gives_up(recorder: CudaRecorder, device: torch.device) -> None:
    """It leaves nothing behind: the stream, the allocator, random numbers and later captures are as ever."""
    stream, one, out = torch.cuda.current_stream(), torch.ones(64, device=device), torch.zeros((), device=device)

    def wait() -> None:
        out.fill_(one.sum().item())

    def run() -> None:
        out.copy_(one.sum())

    with pytest.raises(RuntimeError, match=r"captur"):
        recorder.record(wait)
    assert torch.cuda.current_stream() == stream
    assert torch.rand(8, device=device).unique().numel() > 1
    torch.cuda.empty_cache()
    recorder.rehearse(run)
    replay = recorder.record(run)
    one.fill_(2)
    replay()
    assert out.item() == 128


def test_others_may_free_the_workspaces_of_cublas(recorder: CudaRecorder, device: torch.device) -> None:
    """As PyTorch does where it makes CUDA graphs of compiled functions: those of graphs are in their own memory."""
    left, right = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in ((64, 16384), (16384, 64)))
    out = torch.empty(64, 64, device=device, dtype=torch.bfloat16)

    def run() -> None:
        torch.mm(left, right, out=out)

    recorder.rehearse(run)
    replay = recorder.record(run)
    replay()
    expected = out.clone()
    torch._C._cuda_clearCublasWorkspaces()
    theirs = [torch.full((1 << 18,), torch.nan, device=device) for _ in range(128)]
    replay()
    assert torch.equal(out, expected)
    assert all(bool(tensor.isnan().all()) for tensor in theirs)
