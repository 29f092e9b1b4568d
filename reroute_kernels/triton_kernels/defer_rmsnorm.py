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

from reroute_kernels.triton_kernels._common import Variant, processors

RESIDENT = 8  # programs a multiprocessor: more rows than that share a program, and one load of the weight


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["table", "inverse"])
def _defer_rmsnorm_kernel(
    pages,
    table,
    inverse,
    hidden,
    weight,
    normed,
    count,
    eps,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program takes whole rows, every ``num_programs``-th."""
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    gain = tl.load(weight + column, mask=inside, other=0.0)
    for row in range(tl.program_id(0), count, tl.num_programs(0)):
        home = pages + (tl.load(table + row // PAGE) * PAGE + row % PAGE) * WIDTH
        place = tl.load(inverse + row)
        source = tl.where(place < 0, home, hidden + place * WIDTH)
        value = tl.load(source + column, mask=inside, other=0.0)
        tl.store(home + column, value, mask=column < tl.where(place < 0, 0, WIDTH))
        wide = value.to(tl.float32)
        factor = tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
        # Rounded before the weight, as models do it.
        scaled = (wide * factor).to(value.dtype) * gain
        tl.store(normed + tl.cast(row, tl.int64) * WIDTH + column, scaled, mask=inside)


def defer_rmsnorm(pages: Tensor, table: Tensor, inverse: Tensor, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """:func:`reroute_kernels.reference.defer_rmsnorm` to the lease with these pages and this table, in one launch.

    ValueError if shapes or dtypes disagree, or the pages are not contiguous.
    """
    _, page, features = pages.shape
    count = table.numel() * page
    if weight.shape != (features,) or not pages.is_contiguous():
        raise ValueError(
            f"defer_rmsnorm wants contiguous pages and a norm of {features} features: got strides {pages.stride()} "
            f"and a weight of {tuple(weight.shape)}"
        )
    if inverse.shape != (count,) or hidden.shape[-1] != features or hidden.dtype != pages.dtype:
        raise ValueError(
            f"defer_rmsnorm wants an inverse of {count} rows, and hidden of {features} features and {pages.dtype}: got "
            f"an inverse of {tuple(inverse.shape)}, hidden of {tuple(hidden.shape)} and {hidden.dtype}"
        )
    normed = pages.new_empty(count, features, dtype=torch.promote_types(pages.dtype, weight.dtype))
    if normed.numel():
        grid = min(count, RESIDENT * processors(pages.device)), 1, 1
        tensors = table.contiguous(), inverse.contiguous(), hidden.contiguous(), weight.contiguous(), normed
        _variant(page, features, pages.element_size())(grid, pages, *tensors, count, eps)
    return normed


@lru_cache(maxsize=256)
def _variant(page: int, features: int, itemsize: int) -> Variant:
    block = triton.next_power_of_2(features)
    constants = {"PAGE": page, "WIDTH": features, "BLOCK": block}
    warps = min(max(block * itemsize // 1024, 1), 16)  # two accesses of 16 bytes a thread, where a row is not too long
    return Variant("defer_rmsnorm", _defer_rmsnorm_kernel, constants, num_warps=warps, enable_fp_fusion=False)
