"""Norms of heads that come behind the rotation, where kernels expect them before it."""

from __future__ import annotations

import torch

from reroute_kernels import RMSNorm, RopeTables
from reroute_kernels.reference import Rope, rotate

__all__ = ["as_if_normed_first"]


def as_if_normed_first(
    query: torch.Tensor, of_query: RMSNorm, of_key: RMSNorm, tables: RopeTables, rope: Rope
) -> torch.Tensor:
    """Queries (B, H, D) that give the scores of a layer which norms behind the rotation, with keys normed before.

    Turning changes no length, so the norms' divisors may come first. Their weights are both taken by the query:
    behind its rotation, which is undone then.
    """
    at = tables.query_rows.to(tables.cos.device)
    cos, sin = (table.index_select(0, at).to(query.device).float() for table in tables[:2])
    unit = of_query._replace(weight=torch.ones_like(of_query.weight, dtype=torch.float32))(query.float())
    weighted = rotate(unit, cos, sin, rope) * (of_query.weight * of_key.weight)
    return rotate(weighted, cos, -sin, rope).to(query.dtype)
