"""Hooks on one model: they open a forward, hand its layers over to it, and close it in any case."""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache

from ..errors import RerouteError
from ..plan import Plan, make_plan
from ..prefill import Workspace
from ..schedule import Action, Schedule
from .adapters import ModelAdapter
from .cache import RoutedLayer, cache_of, check_cache, past_length
from .context import NO_GRADIENTS, DensePrefill, ForwardContext, PrefillFactory, RoutedDecode, RoutedPrefill

__all__ = ["RoutingHooks"]

Kwargs = dict[str, Any]
Hook = TypeVar("Hook", bound=Callable[..., Any])


def _uncompiled(hook: Hook) -> Hook:
    """Plans and leases are no business of Dynamo; what lies between two hooks may be compiled."""
    eager: Hook = torch.compiler.disable(hook)
    return eager


class _ThreadState(threading.local):
    """What the present thread is doing with the model."""

    forward: ForwardContext | None = None
    given: tuple[Plan | None, Workspace | None] | None = None
    prompt_end: int | None = None
    labels: torch.Tensor | None = None


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
        schedule.validate(len(adapter.layers), action)
        if schedule.positions == "renumbered" and not adapter.renumbers:
            raise RerouteError(
                "positions='renumbered' needs one position id per token, and this model has three (M-RoPE). "
                "Use positions='preserved'."
            )
        sliding = [i for i in range(schedule.layers[0], len(adapter.layers)) if not adapter.is_full_attention(i)]
        if sliding:
            raise RerouteError(
                f"Layers {sliding} use sliding-window attention, which measures distances that routing changes. "
                "Route a model (or configure this one) with full attention in every layer from the first routing "
                "layer on."
            )
        adapter.mask_form()  # refuses attention that cannot be routed; each forward asks again
        self._adapter: ModelAdapter | None = adapter
        self.schedule, self.action = schedule, action
        self._start, self._done = start, done
        self._state = _ThreadState()
        self._undo: list[Callable[[], None]] = []
        self._attached = False
        self._warned: set[str] = set()

    # --- attaching ------------------------------------------------------------------------------------------------

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
        model.generate = generate = _Generate(self, model)
        undo.append(generate.restore)
        self._attached = True

    def detach(self) -> None:
        """Undo ``attach`` and let go of the model. Idempotent."""
        self._abandon()
        if self._undo:
            _forget_compiled()
        self._attached, self._adapter = False, None
        while self._undo:
            self._undo.pop()()

    @property
    def adapter(self) -> ModelAdapter:
        """The model's. RerouteError once routing is disabled."""
        if self._adapter is None:
            raise RerouteError("Routing of this model was disabled. Call reroute.enable for a new handle.")
        return self._adapter

    @property
    def is_attached(self) -> bool:
        """Whether a model is hooked."""
        return self._attached

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingHooks:
        """What the hooks of a copied model call: nothing. The copy is a plain model of its own."""
        inert = object.__new__(RoutingHooks)
        inert._state, inert._attached = _ThreadState(), False
        return inert

    @contextmanager
    def generating(self, model: Any, args: tuple[Any, ...], kwargs: Kwargs) -> Iterator[None]:
        """Know where the prompt of a ``generate`` ends: later tokens must not choose for it."""
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        self._refuse_chunks((config, model.generation_config), kwargs, ids)
        outer, self._state.prompt_end = self._state.prompt_end, None if ids is None else _prompt_end(ids, kwargs)
        try:
            yield
        finally:
            self._state.prompt_end = outer

    def _refuse_chunks(self, configs: Sequence[Any], kwargs: Kwargs, ids: torch.Tensor | None) -> None:
        sizes = [getattr(config, "prefill_chunk_size", None) for config in configs]
        # As in Transformers: a keyword wins, None included; then whatever is set first.
        size = kwargs.get("prefill_chunk_size", next(filter(None, sizes), None))
        if size and ids is not None and bool(np.isin(ids.cpu().numpy(), self.adapter.visual_ids).any()):
            raise RerouteError(
                "Chunked prefill cannot be routed: the question must be known when visual tokens are ranked. "
                "Call generate with prefill_chunk_size=None (routing already makes long prompts cheaper), or disable "
                "routing."
            )

    # --- planning -------------------------------------------------------------------------------------------------

    @contextmanager
    def using(self, plan: Plan | None) -> Iterator[None]:
        """Use ``plan``, and one place in the pool, for the forwards of this thread instead of reading their ids.

        None, which is what text has for a plan: route nothing.
        """
        workspace = None if plan is None else Workspace(plan)
        outer, self._state.given = self._state.given, (plan, workspace)
        try:
            yield
        finally:
            self._state.given = outer
            if workspace is not None:
                workspace.release()

    def plan(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, cache: Cache | None = None
    ) -> Plan | None:
        """Plan a prefill of ``input_ids`` (B, L); the only place that waits for the device.

        ``attention_mask`` is (B, past + L) or None. Returns None without visual tokens.
        """
        ids = input_ids.cpu().numpy()
        is_visual = np.isin(ids, self.adapter.visual_ids)
        if not is_visual.any():
            return None
        if cache is not None:
            check_cache(cache, range(self.schedule.layers[0], len(self.adapter.layers)))
        past = past_length(cache)
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
        return make_plan(ids, valid, self.adapter.visual_ids, self.schedule, self.action, past=past, prompt_ends=ends)

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

    def _open(self, args: tuple[Any, ...], kwargs: Kwargs) -> ForwardContext | None:
        cache, ids = cache_of(kwargs), args[0] if args else kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if ids is None else ids
        if tokens is None:
            return None  # Transformers raises
        is_step = tokens.shape[1] == 1
        plan = workspace = None
        if self._state.given is not None and not (is_step and past_length(cache)):
            plan, workspace = self._state.given
            if plan is not None:
                _check_given(plan, tokens, cache)
        elif not is_step:
            plan = self._plan_call(ids, kwargs, cache)
        if plan is not None and not plan.changes_nothing:
            if torch.is_grad_enabled() and any(p.requires_grad for p in self.adapter.text.parameters()):
                raise RerouteError(NO_GRADIENTS)
            record = kwargs.get("output_hidden_states")
            record = getattr(self.adapter.text_config, "output_hidden_states", False) if record is None else record
            start = functools.partial(self._start, workspace=workspace)
            return RoutedPrefill(plan, self.adapter, start, cache, record_states=bool(record))
        if plan is not None:
            return DensePrefill(plan, self.adapter)
        if cache is not None and any(isinstance(layer, RoutedLayer) for layer in cache.layers):
            return RoutedDecode(self.adapter)
        return None

    def _plan_call(self, ids: torch.Tensor | None, kwargs: Kwargs, cache: Cache | None) -> Plan | None:
        if ids is None:
            self._warn(
                "the prompt came as inputs_embeds, which do not show where visual tokens are. If it has any, pass "
                "input_ids, or call the model in handle.using(handle.plan(input_ids))"
            )
            return None
        end = self._state.prompt_end
        if end is not None and past_length(cache) >= end:
            return None  # generate() checks drafted tokens: the prompt is behind
        plan = self.plan(ids, kwargs.get("attention_mask"), cache)
        has_picture = any(kwargs.get(k) is not None for k in ("pixel_values", "pixel_values_videos"))
        if plan is None and (has_picture or kwargs.get("mm_encoder_outputs")):
            self._warn(f"there is a picture, but none of its placeholders {self.adapter.visual_ids} in input_ids")
        return plan

    def _warn(self, why: str) -> None:
        if why not in self._warned:
            self._warned.add(why)
            warnings.warn(f"Routing is enabled, but nothing was routed: {why}.", stacklevel=2)

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


def _check_given(plan: Plan, tokens: torch.Tensor, cache: Cache | None) -> None:
    """Refuse ``plan`` for a call of ``tokens`` (B, L) or (B, L, C) that it was not made for."""
    (batch, length), past = tokens.shape[:2], past_length(cache)
    if (batch, length, past) != (plan.batch, plan.length, plan.past):
        raise RerouteError(
            f"The plan in use is for tokens (batch, length) = {plan.batch, plan.length} after {plan.past} in the "
            f"cache; this call has {batch, length} after {past}. Make a plan of its own for it, or call the model "
            "outside of handle.using(plan)."
        )


def _prompt_end(ids: torch.Tensor, kwargs: Kwargs) -> int:
    """One past the logical position of the last token of ``ids`` (B, L), for which ``generate`` is called."""
    mask = kwargs.get("attention_mask")
    # Transformers' rule: under a mask of another length, ids are only the tokens that follow the cache.
    is_whole = mask is None or mask.shape[1] == ids.shape[1]
    return ids.shape[1] + (0 if is_whole else past_length(cache_of(kwargs)))


class _Generate:
    """``model.generate`` while routing is on. Holds the model weakly, and a copied model gets its own back."""

    def __init__(self, controller: RoutingHooks, model: Any) -> None:
        self.__doc__ = model.generate.__doc__
        self._hooks, self._model, self._own = controller, weakref.ref(model), model.__dict__.get("generate")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        with self._hooks.generating(model, args, kwargs):
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


def _forget_compiled() -> None:
    """Compiled code does not see hooks that come or go later, and whatever calls the model may be compiled."""
    torch.compiler.reset()
