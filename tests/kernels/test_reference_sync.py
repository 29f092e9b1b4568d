"""The reference never waits for its device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from reroute_kernels import AttentionSpec, PagedPool, RopeTables, SelectMetadata, SelectRows
from reroute_kernels.reference import admit, defer, diverse_topk, score_topk


def run_all(device: str) -> None:
    """Every operation once, on a ragged batch."""
    pool = PagedPool(16, torch.bfloat16, device, page_size=4)
    with pool.lease([9, 3]) as lease, torch.device(device):
        metadata = SelectMetadata(lease.starts, (9, 3), (6, 0), (3, 3), (2, 0))
        rows = SelectRows(
            torch.arange(6).repeat(2, 1), torch.arange(6, 9).repeat(2, 1), torch.arange(lease.num_rows), metadata
        )
        selection = score_topk(
            torch.randn(2, 4, 8, dtype=torch.bfloat16),
            torch.randn(lease.num_rows, 2, 8, dtype=torch.bfloat16),
            RopeTables(
                torch.randn(lease.num_rows, 8), torch.randn(lease.num_rows, 8), torch.zeros(2, dtype=torch.int64)
            ),
            rows,
            AttentionSpec(0.5),
        )
        assert selection.kept.shape == (2, 2)
        assert selection.active_rows.shape == selection.active_positions.shape == (2, metadata.compact_length) == (2, 5)
        diverse = diverse_topk(lease.rows(), rows)
        assert [t.shape for t in diverse] == [t.shape for t in selection]
        hidden, cos = admit(lease.pages, lease.table, selection.active_rows, torch.randn(lease.num_rows, 8))
        assert (hidden.shape, cos.shape) == ((2, 5, 16), (2, 5, 8))
        defer(lease.pages, lease.table, selection.active_rows, hidden)
        assert lease.rows().shape == (lease.num_rows, 16)


def test_all_operations_under_fake_tensors() -> None:
    with FakeTensorMode():  # reading a value, as a device synchronisation does, raises here
        run_all("cpu")


def test_all_operations_on_a_gpu_without_synchronisation(executor: Any) -> None:
    if executor.kind != "cuda":
        pytest.skip("of a GPU")
    run_all("cuda")
    # What poisons memory here also makes PyTorch's index_copy_ the deterministic one, and that one waits.
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_all("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(True, warn_only=True)
