"""Host-side launch utilities: cached kernel specialization and argument preparation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from triton.runtime import JITFunction, driver


class SpecializedKernel:
    """A kernel with its constants and options; a launch takes about 0.6 of the host time of ``kernel[grid](...)``.

    Triton's own launch works out anew each time what the kernel is to be specialised on, constants included. Here
    the constants are settled, and the arguments are compared by what Triton looks at. Its knobs (debug,
    instrumentation) are read when a kernel is first launched with such arguments.
    """

    def __init__(self, name: str, kernel: Any, constants: dict[str, Any], **options: Any) -> None:
        """``constants``: in the order of the kernel's parameters, which they end. ``options``: num_warps and so on.

        ``name``: what it is, for people; where a kernel has several variants for one model, also what it is for.
        """
        self.name, self._kernel, self.constants, self._options = name, kernel, constants, options
        self._values = tuple(constants.values())
        self._is_interpreted = not isinstance(kernel, JITFunction)
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        """Launch on the current stream; ``arguments`` are tensors, numbers, None and tuples of these."""
        if self._is_interpreted:
            self._kernel[grid](*arguments, **self.constants, **self._options)
            return
        active = driver.active
        key = (active, active.get_current_device(), *[_specialisation(argument) for argument in arguments])
        compiled = self._compiled.get(key)
        if compiled is None or _observer is not None:
            self._compiled[key] = self._launch_by_triton(grid, arguments)
        else:
            compiled[grid](*arguments, *self._values)

    def _launch_by_triton(self, grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> Any:
        """The long way, which compiles or loads what is not there yet, and returns it."""
        begun = perf_counter()
        made = self._kernel[grid](*arguments, **self.constants, **self._options)
        # Inside triton.AsyncCompileMode it is a promise, kept by now and unable to launch.
        compiled = made.result() if hasattr(made, "result") else made
        if (observer := _observer) is not None:
            observer(self.name, compiled, perf_counter() - begun)
        return compiled


Observer = Callable[[str, Any, float], None]
"""Takes the name of a variant, what Triton has compiled for it, and the seconds that the launch took on the host."""

_observer: Observer | None = None
_observing = Lock()


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Tell ``observer`` of every launch in this process until the block ends; one block at a time."""
    global _observer
    with _observing:
        _observer = observer
        try:
            yield
        finally:
            _observer = None


def _specialisation(argument: Any) -> Any:
    """What of an argument a compiled kernel depends on, or something finer."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    if isinstance(argument, tuple):
        return tuple([_specialisation(element) for element in argument])
    if type(argument) is int:
        return argument % 16 == 0, argument == 1, argument >> 31
    return type(argument)


def last_dim_contiguous(tensor: Tensor) -> Tensor:
    """``tensor`` as kernels read it: with its last axis contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@cache
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of ``device``; an H100's where there is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
