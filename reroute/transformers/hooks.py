"""Hooks on one model: they open a forward context, hand the layers over to it, and close it in any case."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..core.plan import Plan
from ..core.schedule import Action, Schedule
from ..errors import RerouteError
from .adapters import ModelAdapter
from .cache import RoutedLayer, cache_of
from .context import DensePrefill, ForwardContext, PrefillFactory, RoutedDecode, RoutedPrefill
from .generate import RoutedGenerate
from .planner import Planner

__all__ = ["RoutingHooks"]

Kwargs = dict[str, Any]
Hook = TypeVar("Hook", bound=Callable[..., Any])


def _uncompiled(hook: Hook) -> Hook:
    """Run a hook eagerly. Dynamo must not trace plans and leases; code between two hooks may still be compiled."""
    eager: Hook = torch.compiler.disable(hook)
    return eager


class _ThreadState(threading.local):
    """The forward that the present thread runs."""

    forward: ForwardContext | None = None


class RoutingHooks:
    """Routes one model by hooks; ``detach`` restores it exactly.

    ``start`` makes the prefill of a plan; ``done`` is told of every prefill with a plan that succeeded.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        schedule: Schedule,
        action: Action,
        start: PrefillFactory,
        done: Callable[[RoutedPrefill | DensePrefill], None],
    ) -> None:
        """Check that ``adapter``'s model can be routed on ``schedule``.

        Raises:
            RerouteError: the schedule does not fit the model, or the model's attention cannot be routed.
        """
        self._planner: Planner | None = Planner(adapter, schedule, action)
        self._start, self._done = start, done
        self._state = _ThreadState()
        self._undo: list[Callable[[], None]] = []
        self._attached = False

    def attach(self, model: Any) -> None:
        """Hook ``model``."""
        adapter, undo = self.adapter, self._undo
        _forget_compiled()
        undo.append(model.register_forward_pre_hook(self._before_model, with_kwargs=True).remove)
        undo.append(model.register_forward_hook(self._after_model, always_call=True).remove)
        undo.append(adapter.base.register_forward_pre_hook(self._before_base, with_kwargs=True).remove)
        undo.append(adapter.base.register_forward_hook(self._after_base, always_call=True).remove)
        undo.append(adapter.text.register_forward_hook(self._after_text).remove)
        for index, layer in enumerate(adapter.layers):
            hook = functools.partial(self._before_layer, index)
            undo.append(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        undo.append(adapter.layers[-1].register_forward_hook(self._after_last_layer).remove)
        model.generate = generate = RoutedGenerate(self._active_planner, model)
        undo.append(generate.restore)
        self._attached = True

    def detach(self) -> None:
        """Undo ``attach`` and let go of the model. Idempotent."""
        self._abandon()
        if self._undo:
            _forget_compiled()
        self._attached, self._planner = False, None
        while self._undo:
            self._undo.pop()()

    @property
    def adapter(self) -> ModelAdapter:
        """The model's. RerouteError once routing is disabled."""
        return self._active_planner.adapter

    @property
    def _active_planner(self) -> Planner:
        if self._planner is None:
            raise RerouteError("Routing of this model was disabled. Call reroute.enable for a new handle.")
        return self._planner

    @property
    def is_attached(self) -> bool:
        """Whether a model is hooked."""
        return self._attached

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingHooks:
        """What the hooks of a copied model call: nothing. The copy is a plain model of its own."""
        inert = object.__new__(RoutingHooks)
        inert._state, inert._attached, inert._planner = _ThreadState(), False, None
        return inert

    def plan(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, cache: Cache | None = None
    ) -> Plan | None:
        """See ``Planner.plan``. RerouteError once routing is disabled."""
        return self._active_planner.plan(input_ids, attention_mask, cache)

    def using(self, plan: Plan | None) -> AbstractContextManager[None]:
        """See ``Planner.using``. RerouteError once routing is disabled."""
        return self._active_planner.using(plan)

    def _open(self, args: tuple[Any, ...], kwargs: Kwargs) -> ForwardContext | None:
        cache = cache_of(kwargs)
        plan, workspace = self._active_planner.plan_call(args, kwargs, cache)
        if plan is not None and not plan.changes_nothing:
            record = kwargs.get("output_hidden_states")
            record = getattr(self.adapter.text_config, "output_hidden_states", False) if record is None else record
            start = functools.partial(self._start, workspace=workspace)
            return RoutedPrefill(plan, self.adapter, start, cache, record_states=bool(record))
        if plan is not None:
            return DensePrefill(plan, self.adapter)
        if cache is not None and any(isinstance(layer, RoutedLayer) for layer in cache.layers):
            return RoutedDecode(self.adapter)
        return None

    # --- hooks ----------------------------------------------------------------------------------------------------

    @_uncompiled
    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> None:
        if self._planner is not None:
            self._planner.labels = kwargs.get("labels")

    @_uncompiled
    def _after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._planner is not None:
            self._planner.labels = None

    @_uncompiled
    def _before_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> None:
        self._abandon()
        if self._attached:
            self._state.forward = self._open(args, kwargs)

    def _abandon(self) -> None:
        """Close a forward that was interrupted: PyTorch runs no forward hooks after KeyboardInterrupt."""
        forward, self._state.forward = self._state.forward, None
        if isinstance(forward, RoutedPrefill):
            forward.close()

    @_uncompiled
    def _after_base(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        forward, self._state.forward = self._state.forward, None
        succeeded = output is not None
        if isinstance(forward, RoutedPrefill):
            forward.close()
            if succeeded:
                forward.finish()
        if isinstance(forward, RoutedPrefill | DensePrefill) and succeeded:
            self._done(forward)

    @_uncompiled
    def _after_text(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        forward = self._state.forward
        if isinstance(forward, RoutedPrefill) and output.get("hidden_states") is not None:
            states = enumerate(output.hidden_states)
            output.hidden_states = tuple(None if h is None else forward.states.get(i, h) for i, h in states)

    @_uncompiled
    def _before_layer(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs
    ) -> tuple[tuple[Any, ...], Kwargs] | None:
        forward = self._state.forward
        if forward is None:
            return None
        replaced = forward.before_layer(index, args[0], kwargs)
        return None if replaced is None else ((replaced[0], *args[1:]), replaced[1])

    @_uncompiled
    def _after_last_layer(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        forward = self._state.forward
        return output if forward is None else forward.after_last_layer(output)


def _forget_compiled() -> None:
    """Compiled code does not see hooks that come or go later, and whatever calls the model may be compiled."""
    torch.compiler.reset()
