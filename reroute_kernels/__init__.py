"""Tensor operations of visual-token routing: the paged pool, defer and admit, score and top-k.

Knows nothing of Transformers or of methods. :mod:`reroute_kernels.reference` is the
specification; :func:`resolve` picks the backend that runs it.
"""

from .dispatch import BACKENDS, Backend, BackendUnavailable, check_backend, resolve
from .pool import Lease, PagedPool, PoolLimitError, PoolStats
from .reference import RMSNorm, Rope, Selection, SelectMetadata
from .warm_up import LoadedKernel, WarmUp, load_kernels

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendUnavailable",
    "Lease",
    "LoadedKernel",
    "PagedPool",
    "PoolLimitError",
    "PoolStats",
    "RMSNorm",
    "Rope",
    "SelectMetadata",
    "Selection",
    "WarmUp",
    "check_backend",
    "load_kernels",
    "resolve",
]
