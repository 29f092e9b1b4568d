"""Where calls enter a routed model: the whole model, its base, its decoder, the vision tower, layers of both.

An entrance is a class that lies before a module's own. It lets a call pass that is none of routing's, or that compiled
code runs as a whole; ``calls`` has what happens of the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .attention import MADE_MASK, MadeMask
from .cache import GuardedRecurrentLayer
from .calls import (
    Args,
    Call,
    Kwargs,
    enter_layer,
    enter_layer_untraced,
    is_reached,
    is_traced,
    leave_layer,
    leave_layer_untraced,
    run_base,
    run_decoder,
    run_model,
    run_tower,
    run_tower_layer,
    run_whole,
)
from .compiled import CompiledStep, adapt_step, is_step, num_tokens
from .forward import FORWARD
from .generation import PROMPT_END, generating, prompt_end
from .interception import Intercepted, own_method, role_of

if TYPE_CHECKING:
    from .adapters import ModelAdapter
    from .router import Router

__all__ = ["RoutedDecoder", "RoutedDecoderLayer", "RoutedTower", "RoutedTowerLayer", "callers"]


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
        return run_model(self, proceed, args, kwargs, has_labels=has_labels)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model, as wrappers do directly."""
        router, proceed = _active(self, kwargs), own_method(RoutedModel, self, "forward")
        return proceed(*args, **kwargs) if router is None else run_model(self, proceed, args, kwargs)


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
                makes_its_own = hasattr(self, "create_masks_for_generate")
                is_causal = not makes_its_own and inputs.get("block_sequence_ids") is None
                inputs[MADE_MASK] = MadeMask(kwargs.get("attention_mask"), is_causal)
        return inputs


class RoutedWhole(RoutedGenerator):
    """A whole model that is its own base. Its forward may be called by itself, or may be one that others put there."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        router, proceed = _active(self, kwargs), own_method(RoutedModel, self, "__call__")
        if router is None:
            _forget_notes(kwargs)
            return proceed(*args, **kwargs)
        return run_model(self, lambda *a, **k: run_whole(self, proceed, a, k), args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Go on with a call, or call the model, as wrappers do directly."""
        router, proceed = _active(self, kwargs), own_method(RoutedModel, self, "forward")
        if router is None or is_reached(self):
            return proceed(*args, **kwargs)
        return run_model(self, lambda *a, **k: run_base(self, proceed, a, k), args, kwargs)


class RoutedBase(Intercepted):
    """The model without its head: gets the ids and the cache, so it plans."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model."""
        router, proceed = _active(self, kwargs), own_method(RoutedBase, self, "__call__")
        if router is None:
            _forget_notes(kwargs)
            return proceed(*args, **kwargs)
        return run_base(self, proceed, args, kwargs)


class RoutedBaseDecoder(RoutedBase):
    """A model without its head that has the layers itself: plans, and is routed."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model."""
        router, proceed = _active(self, kwargs), own_method(RoutedBase, self, "__call__")
        if router is None:
            _forget_notes(kwargs)
            _begin_compiled_step(self, kwargs)
            return proceed(*args, **kwargs)
        return run_base(self, lambda *a, **k: run_decoder(router, self, proceed, a, k), args, kwargs)


class RoutedDecoder(Intercepted):
    """The text model: routed when its base model calls it, its own when others do."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the decoder."""
        router, proceed = _active(self, kwargs), own_method(RoutedDecoder, self, "__call__")
        if router is None:
            _begin_compiled_step(self, kwargs)
            return proceed(*args, **kwargs)
        return run_decoder(router, self, proceed, args, kwargs)


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
        if is_traced():
            args = enter_layer_untraced(self, forward, args, kwargs)
            return leave_layer_untraced(self, forward, proceed(*args, **kwargs))
        args = enter_layer(self, forward, args, kwargs)
        return leave_layer(self, forward, proceed(*args, **kwargs))


class RoutedTower(Intercepted):
    """The vision tower: runs as it is, and what rankers will read of the run is kept."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the tower."""
        router, proceed = _active(self), own_method(RoutedTower, self, "__call__")
        return proceed(*args, **kwargs) if router is None else run_tower(router, proceed, args, kwargs)


class RoutedTowerLayer(Intercepted):
    """A layer of the vision tower: the run may keep what goes in or comes out."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer."""
        router, proceed = _active(self), own_method(RoutedTowerLayer, self, "__call__")
        return proceed(*args, **kwargs) if router is None else run_tower_layer(self, proceed, args, kwargs)


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
    for name in (PROMPT_END, MADE_MASK):
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
