"""Hooks on one model: they open a forward, hand its layers over to it, and close it in any case."""

from __future__ import annotations

import functools
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache

from ..errors import RerouteError
from ..plan import Plan, make_plan
from ..prefill import Reservation
from ..schedule import Action, Schedule
from .cache import RoutedLayer, cache_of, check_cache
from .families import Family
from .forwards import NO_GRADIENTS, Continuation, DensePrefill, Forward, RoutedPrefill, StartPrefill

__all__ = ["Controller"]

Kwargs = dict[str, Any]
Hook = TypeVar("Hook", bound=Callable[..., Any])


def _uncompiled(hook: Hook) -> Hook:
    """Plans and leases are no business of Dynamo; what lies between two hooks may be compiled."""
    eager: Hook = torch.compiler.disable(hook)
    return eager


class _ThreadState(threading.local):
    """What the present thread is doing with the model."""

    forward: Forward | None = None
    given: tuple[Plan, Reservation] | None = None
    prompt_end: int | None = None
    labels: torch.Tensor | None = None


class Controller:
    """Routes one model by hooks; ``detach`` restores it exactly.

    ``start`` makes the prefill of a plan; ``done`` is told of every prefill with a plan that succeeded.
    """

    def __init__(
        self,
        family: Family,
        schedule: Schedule,
        action: Action,
        start: StartPrefill,
        done: Callable[[RoutedPrefill | DensePrefill], None],
    ) -> None:
        """Check that ``family``'s model can be routed on ``schedule``.

        Raises:
            RerouteError: the schedule does not fit the model, or the model's attention cannot be routed.
        """
        schedule.validate(len(family.layers), action)
        if schedule.positions == "renumbered" and not family.renumbers:
            raise RerouteError(
                "positions='renumbered' needs one position id per token, and this model has three (M-RoPE). "
                "Use positions='preserved'."
            )
        sliding = [i for i in range(schedule.layers[0], len(family.layers)) if not family.is_full_attention(i)]
        if sliding:
            raise RerouteError(
                f"Layers {sliding} use sliding-window attention, which measures distances that routing changes. "
                "Route a model (or configure this one) with full attention in every layer from the first routing "
                "layer on."
            )
        self.family, self.schedule, self.action = family, schedule, action
        self._start, self._done = start, done
        self._state = _ThreadState()
        self._undo: list[Callable[[], None]] = []
        self._attached = False
        self._warned = False

    # --- attaching ------------------------------------------------------------------------------------------------

    def attach(self, model: Any) -> None:
        """Hook ``model``."""
        family, undo = self.family, self._undo
        _forget_compiled(model)
        undo.append(model.register_forward_pre_hook(self._before_model, with_kwargs=True).remove)
        undo.append(model.register_forward_hook(self._after_model, always_call=True).remove)
        undo.append(family.base.register_forward_pre_hook(self._before_base, with_kwargs=True).remove)
        undo.append(family.base.register_forward_hook(self._after_base, always_call=True).remove)
        undo.append(family.text.register_forward_hook(self._after_text).remove)
        for index, layer in enumerate(family.layers):
            hook = functools.partial(self._before_layer, index)
            undo.append(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        undo.append(family.layers[-1].register_forward_hook(self._after_last_layer).remove)
        model.generate = generate = _Generate(self, model)
        undo.append(generate.restore)
        self._attached = True

    def detach(self, model: nn.Module | None) -> None:
        """Undo ``attach``. Idempotent; ``model`` may be gone."""
        self._abandon()
        if model is not None and self._undo:
            _forget_compiled(model)
        self._attached = False
        while self._undo:
            self._undo.pop()()

    @property
    def is_attached(self) -> bool:
        """Whether a model is hooked."""
        return self._attached

    def __deepcopy__(self, memo: dict[int, Any]) -> Controller:
        """What the hooks of a copied model call: nothing. The copy is a plain model of its own."""
        inert = object.__new__(Controller)
        inert._state, inert._attached = _ThreadState(), False
        return inert

    @contextmanager
    def generating(self, model: Any, args: tuple[Any, ...], kwargs: Kwargs) -> Iterator[None]:
        """Know where the prompt of a ``generate`` ends: later tokens must not choose for it."""
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        self._refuse_chunks(model, kwargs, ids)
        outer, self._state.prompt_end = self._state.prompt_end, None if ids is None else ids.shape[1]
        try:
            yield
        finally:
            self._state.prompt_end = outer

    def _refuse_chunks(self, model: Any, kwargs: Kwargs, ids: torch.Tensor | None) -> None:
        configs = (kwargs.get("generation_config"), model.generation_config)
        sizes = [kwargs.get("prefill_chunk_size"), *(getattr(c, "prefill_chunk_size", None) for c in configs)]
        if any(sizes) and ids is not None and bool(np.isin(ids.cpu().numpy(), self.family.visual_ids).any()):
            raise RerouteError(
                "Chunked prefill cannot be routed: the question must be known when visual tokens are ranked. "
                "Set prefill_chunk_size=None (routing already makes long prompts cheaper), or disable routing."
            )

    # --- planning -------------------------------------------------------------------------------------------------

    @contextmanager
    def using(self, plan: Plan) -> Iterator[None]:
        """Use ``plan``, and one place in the pool, for the forwards of this thread instead of reading their ids."""
        reservation = Reservation(plan)
        outer, self._state.given = self._state.given, (plan, reservation)
        try:
            yield
        finally:
            self._state.given = outer
            reservation.release()

    def plan(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, cache: Cache | None = None
    ) -> Plan | None:
        """Plan a prefill of ``input_ids`` (B, L); the only place that waits for the device.

        ``attention_mask`` is (B, past + L) or None. Returns None without visual tokens.
        """
        ids = input_ids.cpu().numpy()
        is_visual = np.isin(ids, self.family.visual_ids)
        if not is_visual.any():
            return None
        past = 0
        if cache is not None:
            check_cache(cache, range(self.schedule.layers[0], len(self.family.layers)))
            past = cache.get_seq_length()
        if past and self.schedule.positions == "renumbered":
            raise RerouteError("positions='renumbered' is defined for one prompt only. Start a new cache.")
        valid = np.ones_like(ids, dtype=bool)
        if attention_mask is not None:
            if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
                raise RerouteError(
                    "Routing needs to know which tokens are padding: pass a 2-D attention_mask (batch, length) "
                    "instead of a prepared 4-D mask or a dict of masks."
                )
            valid = attention_mask[:, -ids.shape[1] :].cpu().numpy().astype(bool)
        ends = self._prompt_ends(is_visual, past)
        return make_plan(ids, valid, self.family.visual_ids, self.schedule, self.action, past=past, prompt_ends=ends)

    def _prompt_ends(self, is_visual: Any, past: int) -> list[int]:
        """One past the last prompt token of each sample: answers that are already there must not rank the picture."""
        batch, length = is_visual.shape
        if self._state.prompt_end is not None:
            return [min(length, self._state.prompt_end - past)] * batch
        if self._state.labels is None:
            return [length] * batch
        ends = []
        for row, labels in zip(is_visual, self._state.labels.cpu().numpy(), strict=True):
            picture = np.flatnonzero(row).max(initial=-1)
            answer = np.flatnonzero(labels[picture + 1 :] != -100)
            # Labels from the picture on leave no question: then all of the text is the prompt.
            ends.append(int(picture + 1 + answer[0]) if len(answer) and answer[0] > 0 else length)
        return ends

    def _open(self, args: tuple[Any, ...], kwargs: Kwargs) -> Forward | None:
        cache = cache_of(kwargs)
        plan, reservation = self._state.given or (self._plan_call(args, kwargs, cache), None)
        if plan is not None and not plan.changes_nothing:
            if torch.is_grad_enabled() and any(p.requires_grad for p in self.family.text.parameters()):
                raise RerouteError(NO_GRADIENTS)
            record = kwargs.get("output_hidden_states")
            record = getattr(self.family.text_config, "output_hidden_states", False) if record is None else record
            start = functools.partial(self._start, reservation=reservation)
            return RoutedPrefill(plan, self.family, start, cache, record_states=bool(record))
        if plan is not None:
            return DensePrefill(plan, self.family)
        if cache is not None and any(isinstance(layer, RoutedLayer) for layer in cache.layers):
            return Continuation(self.family)
        return None

    def _plan_call(self, args: tuple[Any, ...], kwargs: Kwargs, cache: Cache | None) -> Plan | None:
        ids = args[0] if args else kwargs.get("input_ids")
        has_picture = any(kwargs.get(k) is not None for k in ("pixel_values", "pixel_values_videos"))
        has_picture = has_picture or bool(kwargs.get("mm_encoder_outputs"))
        if ids is None:
            if has_picture:
                self._warn("the prompt came as inputs_embeds; pass input_ids, which show where the visual tokens are")
            return None
        if ids.shape[1] == 1:
            return None
        end = self._state.prompt_end
        if end is not None and cache is not None and cache.get_seq_length() >= end:
            return None  # generate() checks drafted tokens: the prompt is behind
        plan = self.plan(ids, kwargs.get("attention_mask"), cache)
        if plan is None and has_picture:
            self._warn(f"input_ids hold none of the placeholders {self.family.visual_ids} for visual tokens")
        return plan

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"Routing is enabled and there is a picture, but nothing was routed: {why}.", stacklevel=2)

    # --- hooks ----------------------------------------------------------------------------------------------------

    @_uncompiled
    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> None:
        self._state.labels = kwargs.get("labels")

    @_uncompiled
    def _after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._state.labels = None

    @_uncompiled
    def _before_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> None:
        self._abandon()
        if self._attached:
            self._state.forward = self._open(args, kwargs)

    def _abandon(self) -> None:
        """Close a forward that ended without a word: torch runs no hooks after Ctrl-C."""
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


class _Generate:
    """``model.generate`` while routing is on. Holds the model weakly, and a copied model gets its own back."""

    def __init__(self, controller: Controller, model: Any) -> None:
        self.__doc__ = model.generate.__doc__
        self._controller, self._model, self._own = controller, weakref.ref(model), model.__dict__.get("generate")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        with self._controller.generating(model, args, kwargs):
            return self._original(model)(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._original(memo[id(self._model())])

    def restore(self) -> None:
        model: Any = self._model()
        if model is not None and self._own is None:
            model.__dict__.pop("generate", None)
        elif model is not None:
            model.generate = self._own

    def _original(self, model: Any) -> Any:
        return functools.partial(type(model).generate, model) if self._own is None else self._own


def _forget_compiled(model: nn.Module) -> None:
    """Compiled code does not see hooks that come or go later."""
    if any(m._compiled_call_impl is not None for m in model.modules()) and "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
