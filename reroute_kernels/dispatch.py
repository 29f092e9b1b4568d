"""The choice of a backend: made once per name and device type, logged once, with its reason."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from reroute_kernels import reference
from reroute_kernels.pool import Lease
from reroute_kernels.reference import RMSNorm, Rope, Segments, Selection

KNOWN = ("auto", "torch", "triton")
OVERRIDE = "REROUTE_BACKEND"
OLDEST_TRITON = (3, 4)
OLDEST_GPU = 80  # compute capability times ten

_log = logging.getLogger("reroute")


class BackendUnavailable(RuntimeError):
    """A backend that was asked for cannot run here; ``why`` says so in a clause."""

    def __init__(self, name: str, why: str) -> None:
        """Name the backend, the reason and the way out."""
        super().__init__(f"backend={name!r} cannot run: {why}; use backend='torch' or 'auto'")
        self.why = why


class Admit(Protocol):
    """The type of :func:`reroute_kernels.reference.admit`."""

    def __call__(self, pages: Tensor, table: Tensor, rows: Tensor, *companions: Tensor) -> tuple[Tensor, ...]:
        """Gather rows."""
        ...


class ScoreTopk(Protocol):
    """The type of :func:`reroute_kernels.reference.score_topk`."""

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        cos: Tensor,
        sin: Tensor,
        query_rows: Tensor,
        candidates: Tensor,
        texts: Tensor,
        positions: Tensor,
        segments: Segments,
        *,
        scale: float,
        rope: Rope = "half",
        key_norm: RMSNorm | None = None,
    ) -> Selection:
        """Score and select."""
        ...


@dataclass(frozen=True)
class Backend:
    """The five operations, as specified by :mod:`reroute_kernels.reference`."""

    name: str
    reason: str
    defer: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    admit: Admit
    defer_rmsnorm: Callable[[Lease, Tensor, Tensor, Tensor, RMSNorm], Tensor]
    select: Callable[[Tensor, Tensor, Tensor, Tensor, Segments], Selection]
    score_topk: ScoreTopk

    @classmethod
    def of(cls, name: str, reason: str, operations: Any) -> Backend:
        """The operations of a module."""
        return cls(name, reason, *(getattr(operations, field.name) for field in fields(cls)[2:]))


def resolve(name: str, device: torch.device) -> Backend:
    """The backend ``name`` ("auto", "torch" or "triton") for tensors on ``device``.

    The environment variable REROUTE_BACKEND overrides ``name``. Raises ValueError for an unknown
    name and BackendUnavailable for a backend that cannot run. Call it once and keep the result.
    """
    return _resolve(*_chosen(name), device.type)


def check_backend(name: str) -> None:
    """Raise what :func:`resolve` would raise for any device of this machine, but without touching a GPU.

    For a choice that is made before the process has chosen its GPU, or forked.
    """
    if _chosen(name)[0] == "triton":
        _import_triton("cuda")


def _chosen(name: str) -> tuple[str, str]:
    """The backend that ``name`` or the environment asks for, and which of them does."""
    override = os.environ.get(OVERRIDE)
    chosen = override or name
    if chosen not in KNOWN:
        source = f" (from {OVERRIDE})" if override else ""
        known = ", ".join(map(repr, KNOWN))
        raise ValueError(f"unknown backend {chosen!r}{source}; known: {known}")
    return chosen, f"{OVERRIDE} asks for it" if override else "asked for"


@cache
def _resolve(name: str, asked: str, device_type: str) -> Backend:
    if name == "torch":
        backend = _torch(asked)
    elif name == "triton":
        backend = _triton(asked, device_type)
    else:
        try:
            backend = _triton(f"tensors are on {device_type}", device_type)
        except BackendUnavailable as error:
            backend = _torch(f"triton cannot run: {error.why}")
    _log.info("backend %s on %s: %s", backend.name, device_type, backend.reason)
    return backend


def _torch(reason: str) -> Backend:
    return Backend.of("torch", reason, reference)


def _import_triton(device_type: str) -> Any:
    """The one place that may import triton."""
    if device_type != "cuda":
        raise BackendUnavailable("triton", f"it needs CUDA tensors and these are on {device_type}")
    if not torch.cuda.is_available():
        raise BackendUnavailable("triton", "PyTorch finds no CUDA device")
    try:
        import triton
    except ImportError as error:
        raise BackendUnavailable("triton", f"triton cannot be imported ({error})") from None
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        raise BackendUnavailable("triton", f"it needs triton {oldest} or newer and this is {triton.__version__}")
    return triton


def _triton(reason: str, device_type: str) -> Backend:
    triton = _import_triton(device_type)
    try:
        target = triton.runtime.driver.active.get_current_target()
    except Exception as error:  # the driver's first use builds a C extension: without a compiler, anything may come
        raise BackendUnavailable("triton", f"triton's driver does not start ({error})") from error
    if target.backend != "cuda":
        raise BackendUnavailable("triton", f"the kernels are made for NVIDIA GPUs and this is {target.backend}")
    if target.arch < OLDEST_GPU:
        raise BackendUnavailable(
            "triton", f"it needs compute capability {OLDEST_GPU / 10} or newer and this is {target.arch / 10}"
        )
    from reroute_kernels import ops

    return Backend.of("triton", reason, ops)
