"""The Triton kernels as PyTorch operators, ``torch.ops.reroute_kernels.*``.

An operator is opaque to ``torch.compile`` and CUDA graph capture, has a fake kernel for tracing and a FLOP
formula. Each is defined once in a :class:`torch.library.Library`: that costs about 2 microseconds a call on the
host, against about 15 for ``torch.library.custom_op`` and ``triton_op`` (``python -m bench.overhead``). Nothing
of what those two add is wanted here: the operations have no gradient, as those of the reference have none.

Importing this module imports triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from reroute_kernels.triton_kernels import rows as _rows

NAMESPACE = "reroute_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")


def register(
    schema: str, run: Callable[..., Any], fake: Callable[..., Any], flops: Callable[..., int]
) -> torch._ops.OpOverload[..., Any]:
    """Define the operator ``schema`` and return it; ``flops`` takes shapes where ``run`` takes tensors."""
    name = _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    # For every device: CPU tensors are for the interpreter. The choice of a backend is made in `dispatch`.
    _library.impl(name, run, "CompositeExplicitAutograd")
    # No gradients: without this, PyTorch looks for a formula whenever an input requires one.
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    register_flop_formula(packet)(flops)
    overload: torch._ops.OpOverload[..., Any] = packet.default
    return overload


def _no_flops(*_: object, **__: object) -> int:
    return 0


def _fake_admit(pages: Tensor, table: Tensor, rows: Tensor, companions: Sequence[Tensor]) -> list[Tensor]:
    hidden = pages.new_empty(*rows.shape, pages.shape[2])
    return [hidden, *(companion.new_empty(*rows.shape, companion.shape[1]) for companion in companions)]


defer = register(
    "defer(Tensor(a!) pages, Tensor table, Tensor rows, Tensor hidden) -> ()",
    _rows.defer,
    lambda pages, table, rows, hidden: None,
    _no_flops,
)

admit_list = register(
    "admit(Tensor pages, Tensor table, Tensor rows, Tensor[] companions) -> Tensor[]",
    _rows.admit,
    _fake_admit,
    _no_flops,
)


def admit(pages: Tensor, table: Tensor, rows: Tensor, *companions: Tensor) -> tuple[Tensor, ...]:
    """:func:`reroute_kernels.reference.admit` by the Triton kernel."""
    return tuple(admit_list(pages, table, rows, companions))
