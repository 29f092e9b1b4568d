"""``reroute.enable`` and ``reroute.disable``: for one model, or for every model of the process."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, overload

from torch import nn

from reroute_kernels import BackendUnavailable, PagedPool

from .checks import shown
from .config import RoutingConfig, check_arguments
from .core.schedule import Action, Schedule
from .errors import RerouteError
from .graphs import Graphs
from .methods import Method
from .schedule_file import ScheduleFile, is_file

if TYPE_CHECKING:
    from .handle import Handle
    from .process_handle import ProcessHandle

__all__ = ["disable", "enable", "handle_of"]

logger = logging.getLogger("reroute")

_lock = threading.RLock()
"""Held while models are given handles, or lose them."""
_handles: weakref.WeakKeyDictionary[nn.Module, Handle] = weakref.WeakKeyDictionary()
_common: weakref.WeakSet[Handle] = weakref.WeakSet()
"""Those of ``enable`` without a model, which the next such call ends; settings of one model come first."""
_process_handles: weakref.WeakSet[ProcessHandle] = weakref.WeakSet()
"""What such calls returned: somebody who is in a block of one has it."""


@overload
def enable(
    model: nn.Module,
    *,
    config: RoutingConfig | None = ...,
    method: str | Method | None = ...,
    action: Action = ...,
    keep: float | None = ...,
    schedule: Schedule | str | os.PathLike[str] | None = ...,
    backend: str = ...,
    pool: PagedPool | None = ...,
    trace: bool = ...,
    reopens: bool = ...,
    graphs: bool | Graphs = ...,
) -> Handle: ...


@overload
def enable(
    model: None = None,
    *,
    config: RoutingConfig | None = ...,
    method: str | Method | None = ...,
    action: Action = ...,
    keep: float | None = ...,
    schedule: Schedule | None = ...,
    backend: str = ...,
    trace: bool = ...,
    reopens: bool = ...,
    graphs: bool | Graphs = ...,
) -> ProcessHandle: ...


def enable(
    model: nn.Module | None = None,
    *,
    config: RoutingConfig | None = None,
    method: str | Method | None = None,
    action: Action = "route",
    keep: float | None = None,
    schedule: Schedule | str | os.PathLike[str] | None = None,
    backend: str = "auto",
    pool: PagedPool | None = None,
    trace: bool = False,
    reopens: bool = False,
    graphs: bool | Graphs = False,
) -> Handle | ProcessHandle:
    """Route the prefills of ``model``; without a model, of every supported model of this process, present and future.

    Args:
        model: a supported ``…ForConditionalGeneration``. Enabling it again replaces what was set before; so does
            enabling all again, but for models that were enabled by themselves.
        method: how visual tokens are ranked and on what schedule: a name (default ``"diverse"``) or an instance.
        action: ``"route"`` (bypass, recoverable) or ``"remove"`` (pruning, for comparison).
        keep: budget: visual tokens per layer, mean over all layers, as a share of all (avg_T / N). The method's
            ratios are solved for it. Default: the method's own ratios.
        schedule: decisions (layers, ratios, rankers), instead of ``method`` and ``keep``; or the file that
            ``calibrate`` wrote for this model, whose budget must then be ``keep`` if that is given.
        backend: ``"auto"`` (triton on CUDA, else torch), ``"torch"`` or ``"triton"``. ``REROUTE_BACKEND`` overrides.
            Chosen for the device of the decoder, and again if it moves to one of another type.
        trace: keep the decisions of the last prefill in ``handle.trace``.
        reopens: let each later turn on a cache choose again among all visual tokens, as a fresh prompt of the whole
            conversation would, at the cost of one routed prefill. What it takes is kept with the cache: a hidden state
            per token (``Stats.state_bytes``). Without it, a later turn sees the tokens that the first one chose.
        graphs: replay prefills as CUDA graphs, from the second prompt of a shape class on, or the first after
            ``handle.warm_up``. ``True``, or a ``Graphs`` with limits. What cannot be replayed runs eagerly, and
            ``handle.stats().graph`` says why.
        config: all of these settings in one object, instead of one by one.
        pool: where deferred tokens wait; default: one pool per width, dtype and device, shared and unlimited.

    Returns:
        A handle with ``stats()``, ``totals()``, ``trace``, ``config`` and ``disable()``, also a context manager.
        Without a model one with ``config`` and ``disable()``: ``handle_of`` gives that of a model which was called.

    Raises:
        RerouteError: the model, the method, the schedule or the budget cannot be, or a call runs whose settings would
            be replaced; nothing is changed then.
        reroute_kernels.BackendUnavailable: the backend cannot run here; says why.
    """
    check_arguments(config, pool)
    explicit: Any = schedule
    if is_file(schedule):
        explicit, keep = _schedule_in(schedule, model, keep), None
    given = RoutingConfig(method, action, keep, explicit, backend, trace, reopens, graphs)
    if config is not None and given != RoutingConfig():
        raise RerouteError("Give either config= or single settings, not both: dataclasses.replace changes a config.")
    chosen = given if config is None else config
    if model is not None:
        inner = _unwrapped(model)
        handle = _made(inner, chosen, pool)
        with _lock:
            return _attached(handle, inner)
    if pool is not None:
        raise RerouteError("A pool belongs to one width, dtype and device: pass the model that it is for.")
    return _enable_all(chosen)


def disable(model: nn.Module | None = None) -> None:
    """Undo ``enable`` for ``model``, or for every model of the process.

    Raises:
        RerouteError: a call of the model, or of one of them, runs, or it is a part of one that is routed; nothing is
            changed then.
    """
    inner = None if model is None else _unwrapped(model)
    with _lock:
        if inner is not None:
            handle = _handles.get(inner)
            if handle is not None:
                handle.disable()
                del _handles[inner]
            elif _handles:
                _check_no_part(inner)
            return
        _stop(list(_handles.values()))
        _handles.clear()


def handle_of(model: nn.Module) -> Handle | None:
    """The handle that routes ``model``, also where ``enable`` was called without one; None while nothing does."""
    handle = _handles.get(_unwrapped(model))
    return handle if handle is not None and handle.is_enabled else None


def _schedule_in(path: str | os.PathLike[str], model: nn.Module | None, keep: float | None) -> Schedule:
    """The schedule in a file, for ``model`` and, if it is given, the budget ``keep``."""
    from .transformers import adapter_of

    if model is None:
        raise RerouteError(f"The schedule {os.fspath(path)} is that of one model: pass the model that it is for.")
    return ScheduleFile.read(path).for_model(len(adapter_of(_unwrapped(model)).layers), keep)


def _made(model: nn.Module, config: RoutingConfig, pool: PagedPool | None) -> Handle:
    from .handle import Handle
    from .transformers import adapter_of
    from .transformers.parallel import enabled_together

    def make() -> Handle:
        with _lock:
            return Handle(adapter_of(model), config, pool)

    # Without the lock: others of this process need not wait for what other processes say.
    return enabled_together(model, make, Handle._settings_in_words)


def _attached(handle: Handle, model: nn.Module) -> Handle:
    """``handle``, from now on that of ``model``. With the lock."""
    # Everything is checked: only now may what was set before be replaced.
    handle.attach(model, handle_of(model))
    _handles[model] = handle
    return handle


def _enable_all(config: RoutingConfig) -> ProcessHandle:
    """Check the backend without a model, then route each model when it is next called."""
    from .process_handle import ProcessHandle
    from .transformers import process_wide

    config.check_backend()

    def route(model: nn.Module) -> None:
        try:
            handle = _made(model, config, None)
            with _lock:
                if process_wide.is_current(route):
                    _common.add(_attached(handle, model))
        except (RerouteError, BackendUnavailable) as error:
            # Its text alone: a handler may keep the record, and an error keeps the frames that it went through.
            logger.warning("%s is not routed: %s", type(model).__name__, str(error))

    def stop() -> None:
        with _lock:
            if process_wide.is_current(route):
                _stop_all()

    with _lock:
        for its in _process_handles:
            its._check_replaced()
        _stop_all()
        process_wide.start(route)
        handle = ProcessHandle(config, _lock, lambda: process_wide.is_current(route), stop)
        _process_handles.add(handle)
        return handle


def _stop_all() -> None:
    """Undo the last ``enable`` without a model; models that were enabled by themselves stay routed. With the lock."""
    _stop([handle for handle in _handles.values() if handle in _common])


def _stop(handles: Sequence[Handle]) -> None:
    """Disable all of ``handles`` or none, and route no model any more that is not routed yet."""
    from .transformers import process_wide

    with ExitStack() as idle:
        for handle in handles:
            idle.enter_context(handle.idle())
        process_wide.stop()
        for handle in handles:
            handle.disable()


def _check_no_part(model: nn.Module) -> None:
    from .transformers.interception import role_of

    if role_of(model) is not None:
        raise RerouteError(
            f"{type(model).__name__} is a part of a model that is routed. Pass the whole model to reroute.disable."
        )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what ``torch.compile`` returned. RerouteError if it is no model."""
    inner: Any = getattr(model, "_orig_mod", model)
    if not isinstance(inner, nn.Module):
        raise RerouteError(
            f"Pass the model itself, as AutoModelForImageTextToText.from_pretrained(…) returns it, not {shown(inner)}."
        )
    return inner
