"""The input norm of a layer over all rows of a lease, gathered through its page table: one launch, one pass.

The modules of models take about eight launches, which pass over fp32 copies. Before a decision that would be of the
whole prompt, and cost more than the decision.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from reroute_kernels.reference import RMSNorm
from reroute_kernels.triton_kernels._common import Variant, processors

RESIDENT = 8  # programs a multiprocessor: more rows than that share a program, and one load of the weight


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["table"])
def _norm_kernel(
    pages, table, weight, normed, count, eps, PAGE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """A program takes whole rows, every ``num_programs``-th."""
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    gain = tl.load(weight + column, mask=inside, other=0.0)
    for row in range(tl.program_id(0), count, tl.num_programs(0)):
        slot = tl.load(table + row // PAGE) * PAGE + row % PAGE
        value = tl.load(pages + slot * WIDTH + column, mask=inside, other=0.0)
        wide = value.to(tl.float32)
        factor = tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
        # Rounded before the weight, as models do it.
        scaled = (wide * factor).to(value.dtype) * gain
        tl.store(normed + tl.cast(row, tl.int64) * WIDTH + column, scaled, mask=inside)


def normalise(pages: Tensor, table: Tensor, norm: RMSNorm) -> Tensor:
    """:func:`reroute_kernels.reference.normalise` of the lease with these pages and this table, in one launch.

    ValueError if the norm is not of as many features, or the pages are not contiguous.
    """
    (_, page, features), weight = pages.shape, norm.weight
    if weight.shape != (features,) or not pages.is_contiguous():
        raise ValueError(
            f"normalise wants contiguous pages and a norm of {features} features: got strides {pages.stride()} and a "
            f"weight of {tuple(weight.shape)}"
        )
    count = table.numel() * page
    normed = pages.new_empty(count, features, dtype=torch.promote_types(pages.dtype, weight.dtype))
    if normed.numel():
        grid = min(count, RESIDENT * processors(pages.device)), 1, 1
        tensors = pages, table.contiguous(), weight.contiguous(), normed
        _variant(page, features, pages.element_size())(grid, *tensors, count, norm.eps)
    return normed


@lru_cache(maxsize=256)
def _variant(page: int, features: int, itemsize: int) -> Variant:
    block = triton.next_power_of_2(features)
    constants = {"PAGE": page, "WIDTH": features, "BLOCK": block}
    warps = min(max(block * itemsize // 1024, 1), 16)  # two accesses of 16 bytes a thread, where a row is not too long
    return Variant(_norm_kernel, constants, num_warps=warps, enable_fp_fusion=False)
