"""The choice of a backend: made once per name and device, logged once, with its reason."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from textwrap import shorten
from typing import Any, Protocol

import torch
from torch import Tensor

from . import reference
from .pool import Pages
from .reference import AttentionSpec, RMSNorm, RopeTables, Selection, SelectRows

BACKENDS = ("auto", "torch", "triton")
OVERRIDE = "REROUTE_BACKEND"
OLDEST_TRITON = (3, 6)
OLDEST_GPU = 80  # compute capability times ten

_log = logging.getLogger("reroute")


class BackendUnavailable(RuntimeError):
    """A backend that was asked for cannot run here; ``why`` says so in a clause."""

    def __init__(self, name: str, why: str) -> None:
        """Name the backend, the reason and the way out."""
        super().__init__(f"backend={name!r} cannot run: {why}; use backend='torch' or 'auto'")
        self.why = why


class Admit(Protocol):
    """The type of ``reroute_kernels.reference.admit``."""

    def __call__(self, pages: Tensor, table: Tensor, rows: Tensor, *aux: Tensor) -> tuple[Tensor, ...]:
        """Gather rows."""
        ...


@dataclass(frozen=True)
class Backend:
    """The six operations, as specified by ``reroute_kernels.reference``."""

    name: str
    reason: str
    defer: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    admit: Admit
    defer_rmsnorm: Callable[[Pages, Tensor, Tensor, Tensor, RMSNorm], Tensor]
    select: Callable[[Tensor, SelectRows], Selection]
    score_topk: Callable[[Tensor, Tensor, RopeTables, SelectRows, AttentionSpec], Selection]
    diverse_topk: Callable[[Tensor, SelectRows], Selection]

    @classmethod
    def of(cls, name: str, reason: str, operations: Any) -> Backend:
        """The operations of a module."""
        return cls(name, reason, *(getattr(operations, field.name) for field in fields(cls)[2:]))


def resolve(name: str, device: torch.device) -> Backend:
    """The backend ``name`` ("auto", "torch" or "triton") for tensors on ``device``.

    The environment variable REROUTE_BACKEND overrides ``name``. Raises ValueError for an unknown
    name and BackendUnavailable for a backend that cannot run. Call it once and keep the result.

    Triton counts as able to run once each kernel has been compiled (or found in Triton's cache), loaded and launched
    on ``device``, in a variant that compiles quickly.
    """
    return _resolve(*_chosen(name), device)


def check_backend(name: str) -> None:
    """Raise what ``resolve`` would raise for any device of this machine, but without touching a GPU.

    For a choice that is made before the process has chosen its GPU, or forked.
    """
    if _chosen(name)[0] == "triton":
        _import_triton("cuda")


def _chosen(name: str) -> tuple[str, str]:
    """The backend that ``name`` or the environment asks for, and which of them does."""
    override = os.environ.get(OVERRIDE)
    chosen = override or name
    if chosen not in BACKENDS:
        source = f" (from {OVERRIDE})" if override else ""
        known = ", ".join(map(repr, BACKENDS))
        raise ValueError(f"unknown backend {chosen!r}{source}; known: {known}")
    return chosen, f"{OVERRIDE} asks for it" if override else "asked for"


@cache
def _resolve(name: str, asked: str, device: torch.device) -> Backend:
    if name == "torch":
        backend = _torch(asked)
    elif name == "triton":
        backend = _triton(asked, device)
    else:
        try:
            backend = _triton(f"tensors are on {device.type}", device)
        except BackendUnavailable as error:
            backend = _torch(f"triton cannot run: {error.why}")
    _log.info("backend %s on %s: %s", backend.name, device, backend.reason)
    return backend


def recorded_by_autograd(backend: Backend) -> Backend:
    """What runs instead of ``backend`` in a forward that autograd records: only PyTorch's operations have gradients."""
    return (
        backend if backend.name == "torch" else _torch(f"autograd records the forward, so {backend.name} does not run")
    )


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


def _triton(reason: str, device: torch.device) -> Backend:
    triton = _import_triton(device.type)
    with _on(device):
        try:
            target = triton.runtime.driver.active.get_current_target()
        except Exception as error:  # the driver's first use builds a C extension: without a compiler, anything may come
            raise BackendUnavailable("triton", f"triton's driver does not start ({_said(error)})") from error
        if target.backend != "cuda":
            raise BackendUnavailable("triton", f"the kernels are made for NVIDIA GPUs and this is {target.backend}")
        if target.arch < OLDEST_GPU:
            raise BackendUnavailable(
                "triton", f"it needs compute capability {OLDEST_GPU / 10} or newer and this is {target.arch / 10}"
            )
        return Backend.of("triton", reason, _tried_operations(target.arch))


def _tried_operations(arch: int) -> Any:
    """The operations, once each kernel has been launched on a few rows; nothing waits for the results.

    Any kernel would show what is wrong with the C compiler, ptxas or the driver, but only all of them whether this
    release of Triton compiles them. One variant of each does: what a model needs is compiled by ``Handle.warm_up``, or
    in its first prefill.
    """
    name = "ptxas"
    try:
        _ask_ptxas(arch)
        name = "import"
        from . import ops
        from .triton_kernels.catalogue import SMALLEST

        for case in SMALLEST:
            name = case.name
            case.launch()
    except torch.OutOfMemoryError:
        raise  # says nothing about Triton, and another time there may be room
    except Exception as error:  # Triton, ptxas, a C compiler, the driver: each has its own kind
        raise BackendUnavailable("triton", f"its kernels do not start here: {name} fails ({_said(error)})") from error
    return ops


def _ask_ptxas(arch: int) -> None:
    """RuntimeError if ptxas does not know the GPU: LLVM would end the process over it before ptxas is asked."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
    except ImportError:  # a release that calls them otherwise
        return
    command = [get_ptxas(arch).path, "--gpu-name", sm_arch_from_capability(arch), "--version"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(answer.stderr)


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Make tensors on ``device``, a GPU, and launch there."""
    with torch.cuda.device(device), device:
        yield


def _said(error: BaseException) -> str:
    """The innermost of the errors that led to ``error``, on one line and shortened."""
    while error.__cause__ is not None:
        error = error.__cause__
    # Of Triton's errors, what the compiler said: without the source before it, and the command to repeat it behind.
    words = getattr(error, "error_message", None) or str(error)
    return f"{type(error).__name__}: {shorten(words.partition('Repro command')[0], 200, placeholder=' …')}"
