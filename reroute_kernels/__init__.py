"""Tensor operations of visual-token routing: the paged pool, defer and admit, score and top-k.

Knows nothing of Transformers or of methods. ``reroute_kernels.reference`` is the
specification; ``resolve`` picks the backend that runs it.
"""

from .dispatch import BACKENDS, Backend, BackendUnavailable, check_backend, resolve
from .metadata import SelectMetadata
from .pool import Lease, PagedPool, PoolLimitError, PoolStats
from .reference import AttentionSpec, RMSNorm, Rope, RopeTables, Selection, SelectRows
from .warm_up import LoadedKernel, WarmUp, load_kernels

__all__ = [
    "BACKENDS",
    "AttentionSpec",
    "Backend",
    "BackendUnavailable",
    "Lease",
    "LoadedKernel",
    "PagedPool",
    "PoolLimitError",
    "PoolStats",
    "RMSNorm",
    "Rope",
    "RopeTables",
    "SelectMetadata",
    "SelectRows",
    "Selection",
    "WarmUp",
    "check_backend",
    "load_kernels",
    "resolve",
]
