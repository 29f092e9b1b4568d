"""A plugin of pytest: with ``-p bench.gpu_check.on_device``, tests that name no device run on the GPU.

Random numbers are drawn on the CPU, so a seed gives what it gives there. Graphs are CUDA graphs then, not tapes.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

__all__ = ["OnDevice", "pytest_addoption", "pytest_configure"]

OURS = ("reroute", "reroute_kernels")
"""Packages that say themselves where their tensors go."""


class OnDevice(TorchFunctionMode):
    """What is made without a device is made on ``device``, unless the packages that are tested make it."""

    def __init__(self, device: torch.device) -> None:
        """Not entered yet."""
        super().__init__()
        self._device, self._makers = device, _device_constructors()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``, there."""
        given = dict(kwargs or {})
        caller = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        if func not in self._makers or given.get("device") is not None or caller in OURS:
            return func(*args, **given)
        if given.get("generator") is None and not func.__name__.startswith("rand"):
            return func(*args, **{**given, "device": self._device})
        given.pop("device", None)
        needs_grad = given.pop("requires_grad", False)
        return func(*args, **given).to(self._device).requires_grad_(needs_grad)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", help="where to")


def pytest_configure(config: pytest.Config) -> None:
    OnDevice(torch.device(config.getoption("--device"))).__enter__()  # type: ignore[no-untyped-call]
