"""The norm of pool rows against the reference and the model's own module, on every executor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from reroute_kernels import Lease, PagedPool, RMSNorm, reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def ops(executor: Any) -> Any:
    from reroute_kernels import ops

    return ops


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def scattered(rows: int, features: int, dtype: torch.dtype, device: torch.device, page: int = 4) -> Lease:
    """A lease of ``rows`` random rows, of one sample, whose pages do not follow one another."""
    pool = PagedPool(features, dtype, device, page_size=page)
    pages = -(-rows // page)
    pool.lease([2 * pages * page]).release()  # one slab for all
    singles = [pool.lease([page]) for _ in range(2 * pages)]
    for single in singles[1::2]:
        single.release()
    lease = pool.lease([rows])
    lease.pages[lease.table] = (torch.randn(pages, page, features) * 3).to(dtype).to(device)
    return lease


def norm_of(features: int, dtype: torch.dtype, device: torch.device, eps: float = 1e-5) -> RMSNorm:
    return RMSNorm((torch.rand(features) * 2).to(dtype).to(device), eps)


def close(got: Tensor, rows: Tensor, norm: RMSNorm) -> None:
    """To fp64 throughout, no worse than the reference in the model's dtype; and to the bit in nearly all places."""
    plain, wide = norm(rows), rows.double()
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
    lease, norm = scattered(14, features, dtype, device), norm_of(features, dtype, device)
    close(ops.normalise(lease, norm), lease.rows(), norm)


def test_it_is_what_llama_computes(ops: Any, device: torch.device) -> None:
    module = LlamaRMSNorm(48, eps=1e-3).to(device)
    torch.nn.init.uniform_(module.weight, 0.5, 2)
    lease, norm = scattered(9, 48, FP32, device), RMSNorm(module.weight.detach(), 1e-3)
    expected = module(lease.rows()).detach()
    assert torch.equal(reference.normalise(lease, norm), expected)
    torch.testing.assert_close(ops.normalise(lease, norm), expected, rtol=1e-6, atol=1e-6)


def test_a_weight_of_another_dtype_widens(ops: Any, device: torch.device) -> None:
    """As it does in the model, where norms were cast to fp32 for training."""
    lease, norm = scattered(9, 48, BF16, device), norm_of(48, FP32, device)
    close(ops.normalise(lease, norm), lease.rows(), norm)


def test_more_rows_than_programs(ops: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """No bit depends on how many programs share the rows."""
    from reroute_kernels.triton_kernels import norm as kernel

    lease, norm = scattered(50, 64, BF16, device), norm_of(64, BF16, device)
    wanted = ops.normalise(lease, norm)
    for processors in (1, 2):
        monkeypatch.setattr(kernel, "processors", lambda _: processors)  # noqa: B023
        assert torch.equal(ops.normalise(lease, norm), wanted)


@given(st.data())
def test_any_lease(ops: Any, device: torch.device, data: Any) -> None:
    dtype, features = data.draw(st.sampled_from([BF16, FP16, FP32])), data.draw(st.integers(1, 80))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    page, lengths = data.draw(st.integers(1, 5)), data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
    lease = PagedPool(features, dtype, device, page_size=page).lease(lengths)
    lease.rows().copy_((torch.randn(lease.num_rows, features) * data.draw(st.sampled_from([1e-3, 1, 30]))).to(dtype))
    norm = norm_of(features, dtype, device, data.draw(st.sampled_from([1e-6, 1e-2])))
    got = ops.normalise(lease, norm)
    assert got.shape == (lease.num_rows, features)
    torch.testing.assert_close(got, norm(lease.rows()), rtol=2e-2 if dtype != FP32 else 1e-5, atol=1e-6)


def test_broken_and_empty_rows(ops: Any, device: torch.device) -> None:
    """What is not a number stays in its row."""
    lease, norm = scattered(8, 32, FP32, device), norm_of(32, FP32, device)
    clean = ops.normalise(lease, norm)
    lease.pages[lease.table[0], 1, 5] = float("nan")
    lease.pages[lease.table[1], 0] = 0
    got = ops.normalise(lease, norm)
    assert got[1].isnan().all()
    assert got[4].eq(0).all()
    others = [row for row in range(8) if row not in (1, 4)]
    assert torch.equal(got[others], clean[others])


def test_a_norm_of_other_features_is_refused(ops: Any, device: torch.device) -> None:
    with pytest.raises(ValueError, match="a norm of 32 features"):
        ops.normalise(scattered(8, 32, FP32, device), norm_of(16, FP32, device))


def test_every_row_moves_once(ops: Any, device: torch.device, launches: list[Any]) -> None:
    """In one launch, besides the weight, which each program reads once."""
    rows, features = 48, 512
    lease, norm = scattered(rows, features, BF16, device, page=16), norm_of(features, BF16, device)
    ops.normalise(lease, norm)
    (report,) = launches
    assert report.tensors["pages"].load_bytes == report.tensors["normed"].store_bytes == rows * features * 2
    assert report.global_load.efficiency == report.global_store.efficiency == 1
