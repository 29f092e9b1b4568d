"""Where calls enter a routed model: the whole model, its base, its decoder, the vision tower, layers of both.

Nothing of a call is kept on the modules. The end of a prompt that ``generate`` continues comes in keyword arguments,
and labels in a context variable, to the base model, which opens the forward. That waits in a context variable for the
decoder, which hands it to its layers in keyword arguments; a run of the vision tower waits in another for the layers
of that. Whatever is opened here ends here, in ``finally``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch

from .cache import GuardedRecurrentLayer
from .compiled import CompiledStep, adapt_step, is_step, num_tokens
from .forward import FORWARD, ForwardContext
from .generation import PADDING, PROMPT_END, generating, prompt_end
from .interception import Intercepted, own_method, role_of
from .vision import TowerRun, attach

if TYPE_CHECKING:
    from .adapters import ModelAdapter
    from .router import Router

__all__ = ["Call", "RoutedDecoder", "RoutedDecoderLayer", "RoutedTower", "RoutedTowerLayer", "callers"]

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


class RoutedModel(Intercepted):
    """The whole model: has the labels."""

    signed: ClassVar[tuple[str, ...]] = ("forward",)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        router, proceed = _active(self, kwargs), own_method(RoutedModel, self, "__call__")
        if router is None:
            return proceed(*args, **kwargs)
        # Hooks run before ``forward``, and what they call has no labels; one that others put there may not come by it.
        has_labels = "forward" in vars(self)
        return _run_model(self, proceed, args, kwargs, has_labels=has_labels)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model, as wrappers do directly."""
        router, proceed = _active(self, kwargs), own_method(RoutedModel, self, "forward")
        return proceed(*args, **kwargs) if router is None else _run_model(self, proceed, args, kwargs)


class RoutedGenerator(RoutedModel):
    """A whole model that generates: knows where the prompt ends."""

    signed: ClassVar[tuple[str, ...]] = ("forward", "generate", "prepare_inputs_for_generation")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate: the forwards must know where the prompt ends."""
        proceed, call = own_method(RoutedGenerator, self, "generate"), Call()
        if _active(self) is None:
            return proceed(*args, **kwargs)
        try:
            router = call.begin(self)
            if router is None:
                return proceed(*args, **kwargs)
            with generating(router, self, args, kwargs):
                return proceed(*args, **kwargs)
        finally:
            call.end()

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Tell the forward that ``generate`` makes next from all others that are made meanwhile."""
        inputs = own_method(RoutedGenerator, self, "prepare_inputs_for_generation")(*args, **kwargs)
        router = _active(self)
        if router is not None and router.plans_prefills and (end := prompt_end(router)) is not None:
            inputs[PROMPT_END] = end
            # For static caches generate makes the decoder's masks ahead, which do not tell what is padding.
            is_turn = kwargs.get("is_first_iteration") or num_tokens(inputs) > 1  # steps have no plan, and are compiled
            if is_turn and inputs.get("attention_mask") is not kwargs.get("attention_mask"):
                inputs[PADDING] = kwargs.get("attention_mask")
        return inputs


class RoutedWhole(RoutedGenerator):
    """A whole model that is its own base. Its forward may be called by itself, or may be one that others put there."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        router, proceed = _active(self, kwargs), own_method(RoutedModel, self, "__call__")
        if router is None:
            _forget_notes(kwargs)
            return proceed(*args, **kwargs)
        return _run_model(self, lambda *a, **k: _run_whole(self, proceed, a, k), args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Go on with a call, or call the model, as wrappers do directly."""
        router, proceed = _active(self, kwargs), own_method(RoutedModel, self, "forward")
        if router is None or _is_reached(self):
            return proceed(*args, **kwargs)
        return _run_model(self, lambda *a, **k: _run_base(self, proceed, a, k), args, kwargs)


class RoutedBase(Intercepted):
    """The model without its head: gets the ids and the cache, so it plans."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model."""
        router, proceed = _active(self, kwargs), own_method(RoutedBase, self, "__call__")
        if router is None:
            _forget_notes(kwargs)
            return proceed(*args, **kwargs)
        return _run_base(self, proceed, args, kwargs)


class RoutedBaseDecoder(RoutedBase):
    """A model without its head that has the layers itself: plans, and is routed."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model."""
        router, proceed = _active(self, kwargs), own_method(RoutedBase, self, "__call__")
        if router is None:
            _forget_notes(kwargs)
            _begin_compiled_step(self, kwargs)
            return proceed(*args, **kwargs)
        return _run_base(self, lambda *a, **k: _run_decoder(router, self, proceed, a, k), args, kwargs)


class RoutedDecoder(Intercepted):
    """The text model: routed when its base model calls it, its own when others do."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the decoder."""
        router, proceed = _active(self, kwargs), own_method(RoutedDecoder, self, "__call__")
        if router is None:
            _begin_compiled_step(self, kwargs)
            return proceed(*args, **kwargs)
        return _run_decoder(router, self, proceed, args, kwargs)


class RoutedDecoderLayer(Intercepted):
    """A decoder layer: runs on what the forward gives it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer."""
        forward = kwargs.pop(FORWARD, None)
        if forward is not None and forward.is_idle and isinstance(self, RoutedDecoderLayer):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]  # all that is between it and a decoding step
        proceed = own_method(RoutedDecoderLayer, self, "__call__")
        if forward is None or isinstance(forward, CompiledStep):
            state = _adapt_compiled(self, args, kwargs, forward) if torch.compiler.is_compiling() else None
            output = proceed(*args, **kwargs)
            if state is not None:
                state.forbid_update()
            return output
        args = _enter_layer(self, forward, args, kwargs)
        return _leave_layer(self, forward, proceed(*args, **kwargs))


class RoutedTower(Intercepted):
    """The vision tower: runs as it is, and what rankers will read of the run is kept."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the tower."""
        router, proceed = _active(self), own_method(RoutedTower, self, "__call__")
        return proceed(*args, **kwargs) if router is None else _run_tower(router, proceed, args, kwargs)


class RoutedTowerLayer(Intercepted):
    """A layer of the vision tower: the run may keep what goes in or comes out."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer."""
        router, proceed = _active(self), own_method(RoutedTowerLayer, self, "__call__")
        return proceed(*args, **kwargs) if router is None else _run_tower_layer(self, proceed, args, kwargs)


def callers(adapter: ModelAdapter, model: Any) -> list[tuple[Any, type[Intercepted]]]:
    """What calls the layers of ``model``: decoder, base and itself, of which two may be one; and the entrance of each.

    From the inside out.
    """
    whole = RoutedGenerator if hasattr(model, "generate") else RoutedModel
    if adapter.base is model:
        return [(adapter.text, RoutedDecoder), (model, RoutedWhole)]
    if adapter.base is adapter.text:
        return [(adapter.base, RoutedBaseDecoder), (model, whole)]
    return [(adapter.text, RoutedDecoder), (adapter.base, RoutedBase), (model, whole)]


def _active(module: Any, kwargs: Kwargs | None = None) -> Router | None:
    """The router of ``module``, unless compiled code may run a call with ``kwargs`` without it."""
    role = role_of(module)
    router: Router | None = None if role is None else role.router
    if router is None or not torch.compiler.is_compiling():
        return router
    return None if (kwargs is not None and is_step(kwargs)) or router.may_be_compiled() else router


def _forget_notes(kwargs: Kwargs) -> None:
    """Take out what ``prepare_inputs_for_generation`` has added for a call that is not routed after all."""
    for name in (PROMPT_END, PADDING):
        kwargs.pop(name, None)


def _begin_compiled_step(decoder: Any, kwargs: Kwargs) -> None:
    """Let the layers share what a step on a routed cache makes for them, while Dynamo traces it."""
    role = role_of(decoder) if torch.compiler.is_compiling() else None
    if role is not None and is_step(kwargs):
        kwargs[FORWARD] = CompiledStep(role.router.adapter)


def _adapt_compiled(layer: Any, args: Args, kwargs: Kwargs, step: CompiledStep | None) -> GuardedRecurrentLayer | None:
    """Let ``layer`` take part in a step that is compiled as a whole, if it is one. See ``adapt_step``."""
    role = role_of(layer)
    if role is None:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    return adapt_step(role.layer, role.router.adapter, hidden, kwargs, step)


def _eager_throughout(function: Function) -> Function:
    return _eager(function, recursive=True)


@_eager
def _run_model(model: Any, proceed: Callable[..., Any], args: Args, kwargs: Kwargs, *, has_labels: bool = True) -> Any:
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
def _run_base(base: Any, proceed: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    end, given = kwargs.pop(PROMPT_END, None), _labels.get()
    known, has_made_mask = kwargs, False
    if PADDING in kwargs:
        padding = kwargs.pop(PADDING)
        has_made_mask = padding is None or getattr(padding, "ndim", 0) == 2
        known = {**kwargs, "attention_mask": padding}
    outer, forward, call = _forward.get(), None, Call()
    try:
        router = call.begin(base)
        if router is None:
            return proceed(*args, **kwargs)
        labels = None if given is None or given[0] is not router else given[1]
        _labels.set(None)  # for good: they are those of one call of the base model
        forward = router.open(args, known, labels, end)
        if forward is not None:
            forward.has_made_mask = has_made_mask
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
def _run_whole(model: Any, proceed: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    outer = _whole.get()
    try:
        _whole.set(model)
        return _run_base(model, proceed, args, kwargs)
    finally:
        _whole.set(outer)


@_eager
def _is_reached(model: Any) -> bool:
    """Whether this is the forward of a call that has begun, of which there is one."""
    if _whole.get() is not model:
        return False
    _whole.set(None)
    return True


@_eager_throughout
def _finish(router: Router, forward: ForwardContext) -> None:
    router.finish(forward)


@_eager
def _run_decoder(router: Router, decoder: Any, proceed: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    forward = _forward.get()
    if forward is None or not forward.claim(decoder, args, kwargs):
        return proceed(*args, **kwargs)
    output = router.replay(forward, proceed, kwargs)
    if output is None:
        output = proceed(*args, **kwargs, **{FORWARD: forward})
    return forward.after_decoder(output)


@_eager
def _run_tower(router: Router, proceed: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
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
def _run_tower_layer(layer: Any, proceed: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    run, index = _tower_run.get(), layer._reroute.layer
    if run is None or run.tower.layers[index] is not layer:
        return proceed(*args, **kwargs)
    run.before_layer(index, args[0] if args else kwargs["hidden_states"], kwargs)
    output = proceed(*args, **kwargs)
    run.after_layer(index, output)
    return output


@_eager_throughout
def _enter_layer(layer: Any, forward: ForwardContext, args: Args, kwargs: Kwargs) -> Args:
    """The positional arguments of ``layer``; its keyword arguments are changed in place."""
    hidden, *others = args if args else (kwargs.pop("hidden_states"),)
    return forward.before_layer(layer._reroute.layer, hidden, kwargs), *others


@_eager_throughout
def _leave_layer(layer: Any, forward: ForwardContext, output: Any) -> Any:
    if isinstance(output, tuple):
        return forward.after_layer(layer._reroute.layer, output[0]), *output[1:]
    return forward.after_layer(layer._reroute.layer, output)
