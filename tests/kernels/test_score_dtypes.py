"""Query, keys, tables and key norm of different dtypes, on every executor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import decision, exact

from reroute_kernels import RMSNorm, reference

KERNEL = "score"
pytestmark = pytest.mark.usefixtures("seeded")
NAN = math.nan
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("query", "keys", "norm"),
    [
        (FP32, BF16, FP32),  # norms in fp32, as they are left after training: the query has been through its own
        (FP32, FP16, None),
        (BF16, FP32, None),
        (FP16, BF16, None),
        (BF16, BF16, FP32),
        (FP16, BF16, FP16),
        (FP32, FP32, BF16),
        (FP64, FP64, FP64),
        (FP32, FP64, None),
    ],
)
def test_dtypes_that_differ(
    kernel: Any, device: torch.device, query: torch.dtype, keys: torch.dtype, norm: torch.dtype | None
) -> None:
    """Each is rounded in its own dtype before they meet, as by the reference."""
    arguments, named = decision([90, 65], [80, 64], [33, 20], device, heads=6, features=32, dtype=FP64, poison=NAN)
    arguments = (arguments[0].to(query), arguments[1].to(keys), *arguments[2:])
    if norm is not None:
        weight = (torch.rand(32, device=device) + 0.5).to(norm)
        named["spec"] = named["spec"]._replace(key_norm=RMSNorm(weight, 1e-6))
    got, wanted = kernel.score_topk(*arguments, **named), reference.score_topk(*arguments, **named)
    exact(arguments, got)
    for row, right, n in zip(got.scores, wanted.scores, (80, 64), strict=True):
        # The order of a sum of squares may turn one rounding, of one key.
        assert torch.isclose(row[:n], right[:n], rtol=3e-5).double().mean() > (0.9 if norm else 0.999)


@pytest.mark.parametrize(
    ("which", "dtype"),
    [(0, torch.int64), (1, torch.int8), (1, torch.float8_e4m3fn), (2, torch.complex64), (3, torch.int32)],
)
def test_other_dtypes_are_refused(kernel: Any, device: torch.device, which: int, dtype: torch.dtype) -> None:
    (query, keys, tables, rows), named = decision([20], [18], [5], device, rot=0 if which == 2 else None)
    tensors = [query, keys, tables.cos, keys.new_ones(16)]
    tensors[which] = torch.ones_like(tensors[which], dtype=dtype)
    spec = named["spec"]._replace(key_norm=RMSNorm(tensors[3], 1e-6))
    with pytest.raises(ValueError, match=rf"of torch.bfloat16, .*, not of {dtype}: convert them"):
        kernel.score_topk(tensors[0], tensors[1], tables._replace(cos=tensors[2]), rows, spec)
