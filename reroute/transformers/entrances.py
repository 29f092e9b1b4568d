"""Where calls enter a routed model: the whole model, its base, its decoder, a decoder layer.

Nothing of a call is kept on the modules. The end of a prompt that ``generate`` continues comes in keyword arguments,
and labels in a context variable, to the base model, which opens the forward. That waits in a context variable for the
decoder, which hands it to its layers in keyword arguments. Whatever is opened here ends here, in ``finally``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch

from .generation import PROMPT_END, generating, prompt_end
from .interception import Intercepted

if TYPE_CHECKING:
    from .context import ForwardContext
    from .router import Router

__all__ = ["RoutedBase", "RoutedDecoder", "RoutedDecoderLayer", "RoutedGenerator", "RoutedModel"]

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Function = TypeVar("Function", bound=Callable[..., Any])

FORWARD = "reroute_forward"
"""The keyword argument in which a decoder hands the forward to its layers."""

_labels: ContextVar[tuple[Router, torch.Tensor | None] | None] = ContextVar("reroute_labels", default=None)
"""Of the whole model's call, until its base model is called."""

_forward: ContextVar[ForwardContext | None] = ContextVar("reroute_forward", default=None)
"""Of the base model's call."""


def _eager(function: Function, *, recursive: bool = False) -> Function:
    """Keep Dynamo from tracing plans and leases. Unless ``recursive``, it may compile what is called inside."""
    reason = "reroute plans and routes between compiled parts"
    eager: Function = torch.compiler.disable(function, recursive=recursive, reason=reason)
    return eager


class RoutedModel(Intercepted):
    """The whole model: has the labels."""

    signed: ClassVar[tuple[str, ...]] = ("forward",)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        router, proceed = _active(self), super().__call__  # type: ignore[misc]
        return proceed(*args, **kwargs) if router is None else _run_model(router, proceed, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model: wrappers do so directly. ``__call__`` does not come here if others replaced ``forward``."""
        router, proceed = _active(self), super().forward  # type: ignore[misc]
        return proceed(*args, **kwargs) if router is None else _run_model(router, proceed, args, kwargs)


class RoutedGenerator(RoutedModel):
    """A whole model that generates: knows where the prompt ends."""

    signed: ClassVar[tuple[str, ...]] = ("forward", "generate", "prepare_inputs_for_generation")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate: the forwards must know where the prompt ends."""
        router, proceed = _active(self), super().generate  # type: ignore[misc]
        if router is None or not router.enter():
            return proceed(*args, **kwargs)
        try:
            with generating(router, self, args, kwargs):
                return proceed(*args, **kwargs)
        finally:
            router.leave()

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Tell the forward that ``generate`` makes next from all others that are made meanwhile."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        router = _active(self)
        if router is not None and not router.settings.keeps_all and (end := prompt_end(router)) is not None:
            inputs[PROMPT_END] = end
        return inputs


class RoutedBase(Intercepted):
    """The model without its head: gets the ids and the cache, so it plans."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model."""
        router, proceed = _active(self), super().__call__  # type: ignore[misc]
        return proceed(*args, **kwargs) if router is None else _run_base(router, proceed, args, kwargs)


class RoutedDecoder(Intercepted):
    """The text model: routed when its base model calls it, its own when others do."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the decoder."""
        router, proceed = _active(self), super().__call__  # type: ignore[misc]
        return proceed(*args, **kwargs) if router is None else _run_decoder(self, proceed, args, kwargs)


class RoutedDecoderLayer(Intercepted):
    """A decoder layer: runs on what the forward gives it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer."""
        forward = kwargs.pop(FORWARD, None)
        if forward is None:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        args = _enter_layer(self, forward, args, kwargs)
        return _leave_layer(self, forward, super().__call__(*args, **kwargs))  # type: ignore[misc]


def _active(module: Any) -> Router | None:
    """The router of ``module``, unless compiled code may run without it."""
    role = module._reroute
    router: Router | None = None if role is None else role.router
    return None if router is None or (torch.compiler.is_compiling() and router.may_be_compiled()) else router


def _eager_throughout(function: Function) -> Function:
    return _eager(function, recursive=True)


@_eager
def _run_model(router: Router, proceed: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    if not router.enter():
        return proceed(*args, **kwargs)
    token = _labels.set((router, router.labels_of(args, kwargs)))
    try:
        return proceed(*args, **kwargs)
    finally:
        _labels.reset(token)
        router.leave()


@_eager
def _run_base(router: Router, proceed: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    end = kwargs.pop(PROMPT_END, None)
    if not router.enter():
        return proceed(*args, **kwargs)
    outer_labels, outer_forward, forward = _labels.get(), _forward.get(), None
    labels = None if outer_labels is None or outer_labels[0] is not router else outer_labels[1]
    try:
        forward = router.open(args, kwargs, labels, end)
        _labels.set(None)
        _forward.set(forward)
        output = proceed(*args, **kwargs)
        if forward is not None:
            forward.close()
            router.finish(forward)
        return output
    finally:
        _forward.set(outer_forward)
        _labels.set(outer_labels)
        if forward is not None:
            forward.close()
        router.leave()


@_eager
def _run_decoder(decoder: Any, proceed: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
    forward = _forward.get()
    if forward is None or not forward.claim(decoder, args, kwargs):
        return proceed(*args, **kwargs)
    return forward.after_decoder(proceed(*args, **kwargs, **{FORWARD: forward}))


@_eager_throughout
def _enter_layer(layer: Any, forward: ForwardContext, args: Args, kwargs: Kwargs) -> Args:
    """The positional arguments of ``layer``; its keyword arguments are changed in place."""
    hidden, *others = args if args else (kwargs.pop("hidden_states"),)
    return forward.before_layer(layer._reroute.layer, hidden, kwargs), *others


@_eager_throughout
def _leave_layer(layer: Any, forward: ForwardContext, output: torch.Tensor) -> torch.Tensor:
    return forward.after_layer(layer._reroute.layer, output)
