"""Routing without naming a model: every supported model is routed from its next call on."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from .adapters import is_supported
from .interception import role_of

__all__ = ["is_current", "start", "stop"]

Route = Callable[[nn.Module], None]

_started: dict[Route, Callable[[], None]] = {}
"""What ``start`` was called with, one at most, and what undoes it."""
_MET = "_reroute_met"
"""An attribute of models that have been looked at, which compiled code can read: it cannot look them up."""


def start(route: Route) -> None:
    """Call ``route`` once for every supported model, before its first forward or generation from now on.

    The two methods are replaced on their classes, so that models made before and after are found alike and no other
    module of the process pays for it. Of several threads that call a model first, all wait until it is routed.
    """
    seen: WeakKeyDictionary[nn.Module, None] = WeakKeyDictionary()
    lock = threading.RLock()
    plain_generate = GenerationMixin.generate
    mark = object()  # not shared with others that were started before, nor with copies of a model

    def meet(model: Any) -> None:
        with lock:
            if model not in seen:
                seen[model] = None
                route(model)
            vars(model)[_MET] = mark
            if not is_current(route):  # and nobody comes to take it away
                vars(model).pop(_MET, None)

    why = "reroute.enable() looks at each model when it is first called: call it once before it is compiled"
    meet_eagerly: Callable[[Any], None] = torch.compiler.disable(meet, reason=why)

    def is_new(model: Any) -> bool:
        """Whether the call has to begin anew, as that of a routed model."""
        if role_of(model) is not None or getattr(model, _MET, None) is mark or not is_supported(model):
            return False
        meet_eagerly(model)
        # Meanwhile this may have ended, and another one begun.
        return role_of(model) is not None or not is_current(route)

    def call(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return self(*args, **kwargs) if is_new(self) else nn.Module.__call__(self, *args, **kwargs)

    @functools.wraps(plain_generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.generate(*args, **kwargs) if is_new(self) else plain_generate(self, *args, **kwargs)

    def undo() -> None:
        # In this order: a call that finds that it is over begins anew, and must not find its own method again; and
        # marks that are set after they were taken away are taken away by whoever sets them.
        del PreTrainedModel.__call__
        GenerationMixin.generate = plain_generate  # type: ignore[method-assign]
        del _started[route]
        for met in seen.keyrefs():  # a list made in one step: others may add to it meanwhile
            if (model := met()) is not None:
                vars(model).pop(_MET, None)

    PreTrainedModel.__call__ = call  # type: ignore[method-assign]
    GenerationMixin.generate = generate  # type: ignore[method-assign]
    _started[route] = undo


def stop() -> None:
    """Undo ``start``. Models that are routed stay so until their handles are disabled."""
    for undo in list(_started.values()):
        undo()


def is_current(route: Route) -> bool:
    """Whether ``start`` was called with ``route``, and not undone since: a call that it met may have taken its time."""
    return route in _started
