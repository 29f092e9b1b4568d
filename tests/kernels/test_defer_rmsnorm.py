"""Defer with the norm of all rows, against the reference and the model's own module, on every executor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import gibibytes, num_compiled
from hypothesis import given
from hypothesis import strategies as st
from tensors import padded
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from reroute_kernels import Lease, PagedPool, RMSNorm, reference

KERNEL = "defer_rmsnorm"
pytestmark = pytest.mark.usefixtures("seeded")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@dataclass
class Running:
    """A lease of random rows, and those of them that ran meanwhile."""

    lease: Lease
    rows: Tensor
    inverse: Tensor
    hidden: Tensor

    def through(self, operations: Any, norm: RMSNorm) -> Tensor:
        normed: Tensor = operations.defer_rmsnorm(self.lease, self.rows, self.inverse, self.hidden, norm)
        return normed

    def deferred(self) -> Tensor:
        """What the lease must hold afterwards."""
        expected, rows = self.lease.rows().clone(), self.rows.flatten()
        expected[rows[rows >= 0]] = self.hidden.flatten(0, 1)[rows >= 0]
        return expected


def running(lease: Lease, active: list[Tensor], scale: float = 3.0) -> Running:
    """Rows ``active`` of each sample ran, in any order; whatever the lease holds becomes random."""
    device, dtype, features = lease.pages.device, lease.pages.dtype, lease.pages.shape[2]
    random: Callable[..., Tensor] = lambda *shape: (torch.randn(*shape, features) * scale).to(dtype).to(device)
    lease.pages[lease.table] = random(*lease.table.shape, lease.pages.shape[1])
    rows = padded([picked + start for start, picked in zip(lease.starts, active, strict=True)], align="right")
    inverse = torch.full((lease.num_rows,), -1)
    inverse[rows[rows >= 0]] = torch.arange(rows.numel())[rows.flatten() >= 0]
    return Running(lease, rows.to(device), inverse.to(device), random(*rows.shape))


def scattered(rows: int, features: int, dtype: torch.dtype, device: torch.device, page: int = 4) -> Running:
    """One sample whose pages do not follow one another, and of which about a third ran."""
    pool = PagedPool(features, dtype, device, page_size=page)
    pages = -(-rows // page)
    pool.lease([2 * pages * page]).release()  # one slab for all
    singles = [pool.lease([page]) for _ in range(2 * pages)]
    for single in singles[1::2]:
        single.release()
    return running(pool.lease([rows]), [torch.randperm(rows)[: rows // 3]])


def norm_of(features: int, dtype: torch.dtype, device: torch.device, eps: float = 1e-5) -> RMSNorm:
    return RMSNorm((torch.rand(features) * 2).to(dtype).to(device), eps)


def check(ops: Any, case: Running, norm: RMSNorm) -> None:
    """Rows are moved to the bit. To fp64 throughout, the norm is no worse than the reference in the model's dtype; and
    the same to the bit in nearly all places.
    """
    rows = case.deferred()
    got, plain, wide = case.through(ops, norm), norm(rows), rows.double()
    assert torch.equal(case.lease.rows(), rows)
    truth = wide / (wide.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
    assert got.shape == plain.shape
    assert got.dtype == plain.dtype
    error = (got.double() - truth).abs().mean()
    assert error <= 1.05 * (plain.double() - truth).abs().mean() + 1e-7
    if got.dtype != FP32:  # a last bit of the factor hardly shows
        assert (got == plain).double().mean() > 0.98


@pytest.mark.parametrize("features", [1, 7, 64, 96, 200, 1024])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_any_width_and_dtype(ops: Any, device: torch.device, features: int, dtype: torch.dtype) -> None:
    check(ops, scattered(14, features, dtype, device), norm_of(features, dtype, device))


@pytest.mark.parametrize("ran", [0, 1, 24])
def test_none_one_or_all_ran(ops: Any, device: torch.device, ran: int) -> None:
    lease = PagedPool(48, BF16, device, page_size=8).lease([24])
    check(ops, running(lease, [torch.randperm(24)[:ran]]), norm_of(48, BF16, device))


def test_a_batch_with_fillers_and_page_tails(ops: Any, device: torch.device) -> None:
    lease = PagedPool(48, FP32, device, page_size=8).lease([13, 0, 20, 3])
    active = [torch.tensor([0, 3, 4, 12]), torch.tensor([], dtype=torch.int64), torch.arange(4, 11), torch.arange(3)]
    check(ops, running(lease, active), norm_of(48, FP32, device))


def test_it_is_what_llama_computes(ops: Any, device: torch.device) -> None:
    module = LlamaRMSNorm(48, eps=1e-3).to(device)
    torch.nn.init.uniform_(module.weight, 0.5, 2)
    case, norm = scattered(9, 48, FP32, device), RMSNorm(module.weight.detach(), 1e-3)
    expected = module(case.deferred()).detach()
    torch.testing.assert_close(case.through(ops, norm), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(case.through(reference, norm), expected)


@pytest.mark.parametrize(
    ("dtype", "weight"), [(BF16, FP32), (FP16, FP32), (BF16, FP16), (FP16, BF16), (FP32, BF16), (BF16, FP64)]
)
def test_a_weight_of_another_dtype_widens(
    ops: Any, device: torch.device, dtype: torch.dtype, weight: torch.dtype
) -> None:
    """As it does in the model, where norms were cast to fp32 for training. Both are exact in the wider one."""
    case, norm = scattered(9, 48, dtype, device), norm_of(48, weight, device)
    check(ops, case, norm)
    got, wanted = case.through(ops, norm), norm(case.deferred())
    # A last bit of the factor hardly shows.
    assert torch.isclose(got, wanted, rtol=1e-6, atol=0).double().mean() > 0.9


def test_more_rows_than_programs(ops: Any, kernel: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """No bit depends on how many programs share the rows."""
    case, norm = scattered(50, 64, BF16, device), norm_of(64, BF16, device)
    before, rows = case.lease.pages.clone(), case.deferred()
    wanted = case.through(ops, norm)
    for processors in (1, 2):
        case.lease.pages.copy_(before)
        monkeypatch.setattr(kernel, "num_sms", lambda _: processors)  # noqa: B023
        assert torch.equal(case.through(ops, norm), wanted)
        assert torch.equal(case.lease.rows(), rows)


@given(st.data())
def test_any_lease(ops: Any, device: torch.device, data: Any) -> None:
    dtype, features = data.draw(st.sampled_from([BF16, FP16, FP32])), data.draw(st.integers(1, 80))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    page, lengths = data.draw(st.integers(1, 5)), data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
    active = [torch.randperm(length)[: data.draw(st.integers(0, length))] for length in lengths]
    lease = PagedPool(features, dtype, device, page_size=page).lease(lengths)
    case = running(lease, active, data.draw(st.sampled_from([1e-3, 1, 30])))
    norm, rows = norm_of(features, dtype, device, data.draw(st.sampled_from([1e-6, 1e-2]))), case.deferred()
    got = case.through(ops, norm)
    assert torch.equal(lease.rows(), rows)
    assert got.shape == (lease.num_rows, features)
    torch.testing.assert_close(got, norm(rows), rtol=2e-2 if dtype != FP32 else 1e-5, atol=1e-6)


def test_pages_that_are_gibibytes_apart(executor: Any, kernel: Any, device: torch.device) -> None:
    """No offset is counted in 32 bits."""
    page, features = 4, 64
    far, norm = 2**31 // (page * features), norm_of(features, BF16, device)
    pages = gibibytes(executor, (far + 1) * page * features, BF16).view(-1, page, features)
    rows, hidden = torch.randn(2, page, features).to(pages), torch.randn(1, 1, features).to(pages)
    pages[far], pages[0] = rows
    inverse = torch.tensor([-1, 0, *[-1] * 6], device=device)
    got = kernel.defer_rmsnorm(pages, torch.tensor([far, 0], device=device), inverse, hidden, *norm)
    rows[0, 1] = hidden
    assert torch.equal(torch.stack((pages[far], pages[0])), rows)
    torch.testing.assert_close(got, norm(rows.flatten(0, 1)))


def test_another_number_of_rows_compiles_nothing_anew(
    executor: Any, ops: Any, kernel: Any, device: torch.device
) -> None:
    norm = norm_of(16, FP32, device)
    counts = []
    for rows in (12, 16, 1):
        lease = PagedPool(16, FP32, device, page_size=1).lease([rows])
        check(ops, running(lease, [torch.arange(1)]), norm)
        counts.append(num_compiled(executor, kernel._defer_rmsnorm_kernel))
    assert len(set(counts)) == 1


def test_broken_and_empty_rows(ops: Any, device: torch.device) -> None:
    """What is not a number stays in its row."""
    lease = PagedPool(32, FP32, device, page_size=4).lease([8])
    case, norm = running(lease, [torch.tensor([1, 4, 5])]), norm_of(32, FP32, device)
    clean = case.through(ops, norm)
    lease.pages[lease.table[0], 2, 5] = float("nan")
    case.hidden[0, 0, 5], case.hidden[0, 1] = float("nan"), 0
    got = case.through(ops, norm)
    assert got[[1, 2]].isnan().all()
    assert got[4].eq(0).all()
    others = [0, 3, 5, 6, 7]
    assert torch.equal(got[others], clean[others])


def test_bad_arguments_are_refused(ops: Any, device: torch.device) -> None:
    case, norm = scattered(8, 32, FP32, device), norm_of(32, FP32, device)
    before = case.lease.rows().clone()
    with pytest.raises(ValueError, match="a norm of 32 features"):
        case.through(ops, norm_of(16, FP32, device))
    for wrong in (
        {"inverse": case.inverse[:-1]},
        {"hidden": case.hidden.half()},
        {"hidden": case.hidden[..., :16]},
    ):
        with pytest.raises(ValueError, match="an inverse_index of 8 rows, and hidden of 32 features"):
            Running(**{**vars(case), **wrong}).through(ops, norm)
    assert torch.equal(case.lease.rows(), before)


def test_every_row_moves_once(ops: Any, device: torch.device, launches: list[Any]) -> None:
    """In one launch: what ran is not read back from the pool. Each program reads the weight once."""
    rows, features = 48, 512
    case, norm = scattered(rows, features, BF16, device, page=16), norm_of(features, BF16, device)
    case.through(ops, norm)
    (report,) = launches
    ran, row = rows // 3, features * 2
    assert report.tensors["hidden_ptr"].load_bytes == report.tensors["pages_ptr"].store_bytes == ran * row
    assert report.tensors["pages_ptr"].load_bytes == (rows - ran) * row
    assert report.tensors["normed_ptr"].store_bytes == rows * row
    assert report.global_load.efficiency == report.global_store.efficiency == 1
