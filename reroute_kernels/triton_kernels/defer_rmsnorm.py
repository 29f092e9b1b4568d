"""Defer, fused with the input norm of a layer over all rows of a lease: one launch, one pass through the page table.

A row that ran is read from the compact sequence, and goes home on its way through the norm; a deferred row is read
from its page. The modules of models take about eight launches, which pass over fp32 copies. Before a decision that
would be of the whole prompt, and cost more than the decision.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import SpecializedKernel, num_sms

PROGRAMS_PER_SM = 8  # programs a multiprocessor: more rows than that share a program, and one load of the weight


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["table_ptr", "inverse_ptr"])
def _defer_rmsnorm_kernel(
    pages_ptr,
    table_ptr,
    inverse_ptr,
    hidden_ptr,
    weight_ptr,
    normed_ptr,
    count,
    eps,
    PAGE_SIZE: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A program takes whole rows, every ``num_programs``-th."""
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < HIDDEN_SIZE
    weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(normed_ptr.dtype.element_ty)  # [BLOCK_C]
    for pool_row in range(tl.program_id(0), count, tl.num_programs(0)):
        slot = tl.load(table_ptr + pool_row // PAGE_SIZE) * PAGE_SIZE + pool_row % PAGE_SIZE
        page_ptr = pages_ptr + slot * HIDDEN_SIZE
        compact_index = tl.load(inverse_ptr + pool_row)
        source_ptr = tl.where(compact_index < 0, page_ptr, hidden_ptr + compact_index * HIDDEN_SIZE)
        x = tl.load(source_ptr + offs_c, mask=mask_c, other=0.0)  # [BLOCK_C]
        tl.store(page_ptr + offs_c, x, mask=offs_c < tl.where(compact_index < 0, 0, HIDDEN_SIZE))
        x_fp32 = x.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x_fp32 * x_fp32, 0) / HIDDEN_SIZE + eps)
        # Rounded before the weight, as models do it; of two dtypes as PyTorch promotes them.
        y = (x_fp32 * rstd).to(x.dtype).to(normed_ptr.dtype.element_ty) * weight  # [BLOCK_C]
        tl.store(normed_ptr + tl.cast(pool_row, tl.int64) * HIDDEN_SIZE + offs_c, y, mask=mask_c)


def defer_rmsnorm(
    pages: Tensor, table: Tensor, inverse_index: Tensor, hidden: Tensor, weight: Tensor, eps: float
) -> Tensor:
    """``reroute_kernels.reference.defer_rmsnorm`` to the lease with these pages and this table, in one launch.

    The weight may have another dtype than the rows, as the result then has. Raises what ``check_inputs`` raises.
    """
    check_inputs(pages, table, inverse_index, hidden, weight)
    _, page, features = pages.shape
    count = table.numel() * page
    normed = pages.new_empty(count, features, dtype=torch.promote_types(pages.dtype, weight.dtype))
    if normed.numel():
        grid = min(count, PROGRAMS_PER_SM * num_sms(pages.device)), 1, 1
        tensors = table.contiguous(), inverse_index.contiguous(), hidden.contiguous(), weight.contiguous(), normed
        _specialized(page, features, pages.element_size())(grid, pages, *tensors, count, eps)
    return normed


def check_inputs(pages: Tensor, table: Tensor, inverse_index: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """Check what ``defer_rmsnorm`` gets, also where it is only traced.

    Raises:
        ValueError: shapes or dtypes disagree, or the pages are not contiguous.
    """
    _, page, features = pages.shape
    count = table.numel() * page
    if weight.shape != (features,) or not pages.is_contiguous():
        raise ValueError(
            f"defer_rmsnorm wants contiguous pages and a norm of {features} features: got strides {pages.stride()} "
            f"and a weight of {tuple(weight.shape)}"
        )
    if inverse_index.shape != (count,) or hidden.shape[-1] != features or hidden.dtype != pages.dtype:
        raise ValueError(
            f"defer_rmsnorm wants an inverse_index of {count} rows, and hidden of {features} features and "
            f"{pages.dtype}: got an inverse_index of {tuple(inverse_index.shape)}, hidden of {tuple(hidden.shape)} and "
            f"{hidden.dtype}"
        )


@lru_cache(maxsize=256)
def _specialized(page_size: int, hidden_size: int, itemsize: int) -> SpecializedKernel:
    block = triton.next_power_of_2(hidden_size)
    constants = {"PAGE_SIZE": page_size, "HIDDEN_SIZE": hidden_size, "BLOCK_C": block}
    warps = min(max(block * itemsize // 1024, 1), 16)  # two accesses of 16 bytes a thread, where a row is not too long
    return SpecializedKernel("defer_rmsnorm", _defer_rmsnorm_kernel, constants, num_warps=warps, enable_fp_fusion=False)
