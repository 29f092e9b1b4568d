"""Routing without naming a model: every supported model is hooked when it is next called."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from .adapters import is_supported

__all__ = ["start", "stop"]

_undo: list[Callable[[], None]] = []


def start(route: Callable[[nn.Module], None]) -> None:
    """Call ``route`` once for every supported model, before its first forward or generation from now on.

    The two methods are replaced on their classes, so that models made before and after are found alike and no other
    module of the process pays for it.
    """
    seen: WeakSet[nn.Module] = WeakSet()
    plain_generate = GenerationMixin.generate

    def is_new(model: Any) -> bool:
        if model in seen or not is_supported(model):
            return False
        seen.add(model)
        route(model)
        return True

    def call(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        is_new(self)
        return nn.Module.__call__(self, *args, **kwargs)

    @functools.wraps(plain_generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_new(self):
            return self.generate(*args, **kwargs)
        return plain_generate(self, *args, **kwargs)

    def undo() -> None:
        del PreTrainedModel.__call__
        GenerationMixin.generate = plain_generate  # type: ignore[method-assign]

    PreTrainedModel.__call__ = call  # type: ignore[method-assign]
    GenerationMixin.generate = generate  # type: ignore[method-assign]
    _undo.append(undo)


def stop() -> None:
    """Undo ``start``. Models that were hooked stay so until their handles are disabled."""
    while _undo:
        _undo.pop()()
