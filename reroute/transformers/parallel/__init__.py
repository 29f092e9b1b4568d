"""Models that several processes run together: tensor parallelism, and weights that FSDP2 shards."""

from __future__ import annotations

from .agreement import enabled_together
from .ranks import HeadRanks, check_heads, head_ranks
from .sharded import check_tower, check_unit, check_unwrapped, has_distributed_weights, is_sharded, unshard

__all__ = [
    "HeadRanks",
    "check_heads",
    "check_tower",
    "check_unit",
    "check_unwrapped",
    "enabled_together",
    "has_distributed_weights",
    "head_ranks",
    "is_sharded",
    "unshard",
]
