"""What happens of a call behind its entrance: it is noted, opened, handed on to the layers, and ended.

Nothing of a call is kept on the modules. The end of a prompt that ``generate`` continues comes in keyword arguments,
and labels in a context variable, to the base model, which opens the forward. That waits in a context variable for the
decoder, which hands it to its layers in keyword arguments; a run of the vision tower waits in another for the layers
of that. Whatever is opened here ends here, in ``finally``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from .attention import MADE_MASK, MadeMask
from .forward import FORWARD, ForwardContext
from .generation import PROMPT_END, prompt_end
from .interception import role_of
from .vision import TowerRun, attach

if TYPE_CHECKING:
    from .router import Router

__all__ = [
    "Args",
    "Call",
    "Kwargs",
    "enter_layer",
    "enter_layer_untraced",
    "is_reached",
    "is_traced",
    "leave_layer",
    "leave_layer_untraced",
    "run_base",
    "run_decoder",
    "run_model",
    "run_tower",
    "run_tower_layer",
    "run_whole",
]

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Function = TypeVar("Function", bound=Callable[..., Any])

_labels: ContextVar[tuple[Router, torch.Tensor | None] | None] = ContextVar("reroute_labels", default=None)
"""Of the whole model's call, until its base model is called."""

_forward: ContextVar[ForwardContext | None] = ContextVar("reroute_forward", default=None)
"""Of the base model's call."""

_whole: ContextVar[Any] = ContextVar("reroute_whole", default=None)
"""A whole model that is its own base, from its call until its ``forward``."""

_tower_run: ContextVar[TowerRun | None] = ContextVar("reroute_tower_run", default=None)
"""Of the vision tower's call."""


def _eager(function: Function, *, recursive: bool = False) -> Function:
    """Keep Dynamo from tracing plans and leases. Unless ``recursive``, it may compile what is called inside."""
    reason = "reroute plans and routes between compiled parts"
    eager: Function = torch.compiler.disable(function, recursive=recursive, reason=reason)
    return eager


class Call:
    """A call that runs. It is over once nobody holds it, even if an interrupt has kept it from saying so."""

    __slots__ = ("__weakref__", "router")

    def __init__(self) -> None:
        """It has not begun."""
        self.router: Router | None = None

    def begin(self, module: Any) -> Router | None:
        """The router of ``module``, which has taken note of it; None if routing was disabled meanwhile."""
        while (role := role_of(module)) is not None and not role.router.enter(self):
            pass  # it was replaced, or disabled, since it was looked up
        return self.router

    def end(self) -> None:
        """Idempotent."""
        if self.router is not None:
            self.router.leave(self)


def _eager_throughout(function: Function) -> Function:
    return _eager(function, recursive=True)


@_eager
def run_model(model: Any, proceed: Callable[..., Any], args: Args, kwargs: Kwargs, *, has_labels: bool = True) -> Any:
    """Run a call of the whole ``model``, whose labels its base model finds."""
    outer, call = _labels.get(), Call()
    try:
        router = call.begin(model)
        if router is not None:
            router.check_base(model)
            _labels.set((router, router.labels_of(args, kwargs)) if has_labels else None)
        return proceed(*args, **kwargs)
    finally:
        _labels.set(outer)
        call.end()


@_eager
def run_base(base: Any, proceed: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Run a call of the ``base`` model: its forward."""
    end, given = kwargs.pop(PROMPT_END, None), _labels.get()
    made: MadeMask | None = kwargs.pop(MADE_MASK, None)
    known = kwargs if made is None else {**kwargs, "attention_mask": made.padding}
    outer, forward, call = _forward.get(), None, Call()
    try:
        router = call.begin(base)
        if router is None:
            return proceed(*args, **kwargs)
        labels = None if given is None or given[0] is not router else given[1]
        _labels.set(None)  # for good: they are those of one call of the base model
        forward = router.open(args, known, labels, end)
        if forward is not None:
            forward.made_mask = made if made is not None and made.is_known else None
        _forward.set(forward)
        output = proceed(*args, **kwargs)
        if forward is not None:
            forward.close()
            _finish(router, forward)
        return output
    except BaseException:
        if forward is not None:
            forward.abandon()
        raise
    finally:
        _forward.set(outer)
        if forward is not None:
            forward.close()
        call.end()


@_eager
def run_whole(model: Any, proceed: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Run a call of a ``model`` that is its own base."""
    outer = _whole.get()
    try:
        _whole.set(model)
        return run_base(model, proceed, args, kwargs)
    finally:
        _whole.set(outer)


@_eager
def is_reached(model: Any) -> bool:
    """Whether this is the forward of a call that has begun, of which there is one."""
    if _whole.get() is not model:
        return False
    _whole.set(None)
    return True


@_eager_throughout
def _finish(router: Router, forward: ForwardContext) -> None:
    router.finish(forward)


@_eager
def run_decoder(router: Router, decoder: Any, proceed: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Run the ``decoder`` as a part of the forward that calls it; as the plain one if none does."""
    forward = _forward.get()
    if forward is None or not forward.claim(decoder, args, kwargs):
        return proceed(*args, **kwargs)
    output = router.replay(forward, proceed, kwargs)
    if output is None:
        output = proceed(*args, **kwargs, **{FORWARD: forward})
    return forward.after_decoder(output)


@_eager
def run_tower(router: Router, proceed: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Run the vision tower, and keep what rankers will read of it."""
    outer, forward = _tower_run.get(), _forward.get()
    if forward is not None and not forward.is_of(router.adapter):
        forward = None  # that of a model that calls this one
    run = None
    if forward is None or forward.recording is not None:
        run = router.tower_run(args, kwargs, is_for_one=prompt_end(router) is not None)
    try:
        _tower_run.set(run)
        output = proceed(*args, **kwargs)
    finally:
        _tower_run.set(outer)
    if run is None:
        return output
    if forward is None:
        attach(run, output)  # to features that are made ahead of their forward
    elif forward.recording is not None:
        forward.recording.add(run)
    return output


@_eager
def run_tower_layer(layer: Any, proceed: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    """Run a ``layer`` of the vision tower, whose run may keep what goes in or comes out."""
    run, index = _tower_run.get(), layer._reroute.layer
    if run is None or run.tower.layers[index] is not layer:
        return proceed(*args, **kwargs)
    run.before_layer(index, args[0] if args else kwargs["hidden_states"], kwargs)
    output = proceed(*args, **kwargs)
    run.after_layer(index, output)
    return output


def enter_layer(layer: Any, forward: ForwardContext, args: Args, kwargs: Kwargs) -> Args:
    """The positional arguments of ``layer``; its keyword arguments are changed in place."""
    hidden, *others = args if args else (kwargs.pop("hidden_states"),)
    return forward.before_layer(layer._reroute.layer, hidden, kwargs), *others


def leave_layer(layer: Any, forward: ForwardContext, output: Any) -> Any:
    """The ``output`` of ``layer`` as the next one gets it."""
    if isinstance(output, tuple):
        return forward.after_layer(layer._reroute.layer, output[0]), *output[1:]
    return forward.after_layer(layer._reroute.layer, output)


enter_layer_untraced, leave_layer_untraced = _eager_throughout(enter_layer), _eager_throughout(leave_layer)


def is_traced() -> bool:
    """Whether Dynamo traces this call, or would compile what it calls: what keeps it from that is 11 calls for each."""
    return torch.compiler.is_compiling() or get_eval_frame_callback() is not None
