"""From a call of the model to the plan of its prefill: visual tokens, the end of the prompt, what is refused."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache

from ..core.plan import Plan, make_plan
from ..core.schedule import Action, Schedule
from ..core.workspace import Workspace
from ..errors import RerouteError
from .adapters import ModelAdapter
from .attention import mask_format_of
from .cache import cache_of, check_cache, past_length

__all__ = ["Planner"]

Kwargs = dict[str, Any]


class _ThreadState(threading.local):
    """What the present thread told of the calls to come."""

    given: tuple[Plan | None, Workspace | None] | None = None
    prompt_end: int | None = None
    labels: torch.Tensor | None = None


class Planner:
    """Plans the calls of one model, from any thread."""

    def __init__(self, adapter: ModelAdapter, schedule: Schedule, action: Action) -> None:
        """Check that the model can be routed on ``schedule``.

        Raises:
            RerouteError: the schedule does not fit the model, or the model's attention cannot be routed.
        """
        schedule.validate(len(adapter.layers), action)
        if schedule.position_mode == "renumbered" and not adapter.renumbers:
            raise RerouteError(
                "position_mode='renumbered' needs one position id per token, and this model has three (M-RoPE). "
                "Use position_mode='preserved'."
            )
        sliding = [i for i in range(schedule.layers[0], len(adapter.layers)) if not adapter.is_full_attention(i)]
        if sliding:
            raise RerouteError(
                f"Layers {sliding} use sliding-window attention, which measures distances that routing changes. "
                "Route a model (or configure this one) with full attention in every layer from the first routing "
                "layer on."
            )
        mask_format_of(adapter.text_config)  # refuses attention that cannot be routed; each forward asks again
        self.adapter = adapter
        self._schedule, self._action = schedule, action
        self._state = _ThreadState()
        self._warned: set[str] = set()

    @property
    def labels(self) -> torch.Tensor | None:
        """Of the call that now runs in this thread."""
        return self._state.labels

    @labels.setter
    def labels(self, labels: torch.Tensor | None) -> None:
        self._state.labels = labels

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
            check_cache(cache, range(self._schedule.layers[0], len(self.adapter.layers)))
        past = past_length(cache)
        if past and self._schedule.position_mode == "renumbered":
            raise RerouteError("position_mode='renumbered' is defined for one prompt only. Start a new cache.")
        valid = np.ones_like(ids, dtype=bool)
        if attention_mask is not None:
            if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
                raise RerouteError(
                    "Routing needs to know which tokens are padding: pass a 2-D attention_mask (batch, length) "
                    "instead of a prepared 4-D mask or a dict of masks."
                )
            valid = attention_mask[:, -ids.shape[1] :].cpu().numpy().astype(bool)
        ends = self._prompt_ends(is_visual, past)
        return make_plan(ids, valid, self.adapter.visual_ids, self._schedule, self._action, past=past, prompt_ends=ends)

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

    def plan_call(
        self, args: tuple[Any, ...], kwargs: Kwargs, cache: Cache | None
    ) -> tuple[Plan | None, Workspace | None]:
        """The plan of a call of the base model, and the workspace that ``using`` holds for it.

        Raises:
            RerouteError: the call cannot be routed, or does not fit the plan in use.
        """
        ids = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if ids is None else ids
        if tokens is None:
            return None, None  # Transformers raises
        is_step = tokens.shape[1] == 1
        if self._state.given is not None and not (is_step and past_length(cache)):
            plan, workspace = self._state.given
            if plan is not None:
                _check_given(plan, tokens, cache)
            return plan, workspace
        return (None if is_step else self._plan_prefill(ids, kwargs, cache)), None

    def _plan_prefill(self, ids: torch.Tensor | None, kwargs: Kwargs, cache: Cache | None) -> Plan | None:
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
