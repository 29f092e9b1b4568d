"""Query, keys, tables and key norm of different dtypes, on every executor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import ScoreCase, ScoreShape, exact

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
    inputs = ScoreCase([90, 65], [80, 64], [33, 20], ScoreShape(6, 2, 32, dtype=FP64), poison=NAN).inputs(device)
    inputs = inputs._replace(query=inputs.query.to(query), keys=inputs.keys.to(keys))
    if norm is not None:
        weight = (torch.rand(32, device=device) + 0.5).to(norm)
        inputs = inputs._replace(spec=inputs.spec._replace(key_norm=RMSNorm(weight, 1e-6)))
    got, wanted = kernel.score_topk(*inputs), reference.score_topk(*inputs)
    exact(inputs.rows, got)
    for row, right, n in zip(got.scores, wanted.scores, (80, 64), strict=True):
        # The order of a sum of squares may turn one rounding, of one key.
        assert torch.isclose(row[:n], right[:n], rtol=3e-5).double().mean() > (0.9 if norm else 0.999)


@pytest.mark.parametrize(
    ("which", "dtype"),
    [(0, torch.int64), (1, torch.int8), (1, torch.float8_e4m3fn), (2, torch.complex64), (3, torch.int32)],
)
def test_other_dtypes_are_refused(kernel: Any, device: torch.device, which: int, dtype: torch.dtype) -> None:
    inputs = ScoreCase([20], [18], [5], ScoreShape(rotary_dim=0 if which == 2 else None)).inputs(device)
    tensors = [inputs.query, inputs.keys, inputs.tables.cos, inputs.keys.new_ones(16)]
    tensors[which] = torch.ones_like(tensors[which], dtype=dtype)
    query, keys, cos, weight = tensors
    tables, spec = inputs.tables._replace(cos=cos), inputs.spec._replace(key_norm=RMSNorm(weight, 1e-6))
    with pytest.raises(ValueError, match=rf"of torch.bfloat16, .*, not of {dtype}: convert them"):
        kernel.score_topk(query, keys, tables, inputs.rows, spec)
