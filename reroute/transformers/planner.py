"""From a call of the base model to the plan of its prefill: what is visual, where the prompt ends, what is refused.

Everything is refused here, before anything of the model, the cache or the pool has changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache

from ..config import Settings
from ..core.plan import Plan, make_plan, visual_mask
from ..errors import RerouteError
from .adapters import ModelAdapter
from .attention import mask_format_of
from .cache import cache_of, check_cache, check_whole, is_renumbered, past_length
from .packing import check_one_prompt_per_row, check_tokens_of_others

__all__ = ["Planner", "Prompt", "has_picture"]

Kwargs = Mapping[str, Any]

PICTURES = ("pixel_values", "mm_encoder_outputs")
"""What names of arguments have in them in which pictures come."""


@dataclass(frozen=True)
class Prompt:
    """What a plan is made of, apart from the settings.

    - ``ids`` (B, L): tokens of the call. ``mask`` (B, past + L) or None.
    - ``positions``: position ids (B, L), or (3 or 4, B, L) of M-RoPE, or None.
    - ``labels`` (B, L) or None: the prompt of a sample ends where its answer begins.
    - ``end``: one past the logical position of the last prompt token, or None where that is the last token.
    """

    ids: torch.Tensor
    mask: Any = None
    positions: torch.Tensor | None = None
    cache: Cache | None = None
    labels: torch.Tensor | None = None
    end: int | None = None


class Planner:
    """Plans the calls of one model. Knows nothing of the calls before."""

    def __init__(self, adapter: ModelAdapter) -> None:
        """Of the model of ``adapter``."""
        self.adapter = adapter
        self._warned: set[str] = set()

    def check(self, settings: Settings) -> None:
        """Check that the model can be routed by ``settings``.

        Raises:
            RerouteError: the schedule does not fit the model, or its attention cannot be routed.
        """
        adapter, schedule = self.adapter, settings.schedule
        schedule.validate(len(adapter.layers), settings.config.action)
        if schedule.position_mode == "renumbered" and not adapter.renumbers:
            raise RerouteError(
                "position_mode='renumbered' needs one position id per token, and this model has three (M-RoPE). "
                "Use position_mode='preserved'."
            )
        if settings.keeps_all:
            return  # the plain model, whatever its attention
        if schedule.layers[0] < adapter.first_layer:
            raise RerouteError(
                f"Features of the pictures come between layers, the last ones before layer {adapter.first_layer}, and "
                f"the first routing layer is {schedule.layers[0]}. Decide from layer {adapter.first_layer} on."
            )
        compact = range(schedule.layers[0], len(adapter.layers))
        sliding = [index for index in compact if not adapter.is_full_attention(index)]
        if sliding:
            raise RerouteError(
                f"Layers {sliding} use sliding-window attention, which measures distances that routing changes. "
                "Route a model (or configure this one) with full attention in every layer from the first routing "
                "layer on."
            )
        scoring = {layer + ranker.layer_offset for layer, ranker in zip(schedule.layers, schedule.rankers, strict=True)}
        adapter.check_facts(sorted(scoring.union(schedule.looks)), compact)
        if settings.needs_vision:
            adapter.tower.wanted_by(schedule.rankers)
        for layer, ranker in zip(schedule.layers, schedule.rankers, strict=True):
            ranker.check(adapter, layer + ranker.layer_offset)
        mask_format_of(adapter.text_config)  # refuses attention that cannot be routed; each forward asks again

    def plan(self, prompt: Prompt, settings: Settings) -> Plan | None:
        """Plan a prefill; the only place that waits for the device. None without visual tokens.

        Raises:
            RerouteError: this prompt cannot be routed.
        """
        ids = prompt.ids.cpu().numpy()
        is_visual = visual_mask(ids, self.adapter.visual_ids)
        if not is_visual.any():
            return None
        past, schedule = past_length(prompt.cache), settings.schedule
        valid = _valid(prompt)
        plan = make_plan(
            ids,
            np.ones_like(ids, dtype=bool) if valid is None else valid,
            self.adapter.visual_ids,
            schedule,
            settings.config.action,
            past=past,
            prompt_ends=_prompt_ends(prompt, is_visual, past),
        )
        if plan is not None and not plan.changes_nothing:
            if prompt.labels is not None:
                plan = replace(plan, knows_labels=True)
            self.check_call(plan, prompt.cache)
            if valid is None:  # asked last: for a cache that cannot be used, generate itself prepares such masks
                raise RerouteError(
                    "Routing needs to know which tokens are padding: pass a 2-D attention_mask (batch, length) instead "
                    "of a prepared 4-D mask or a dict of masks."
                )
            check_one_prompt_per_row(prompt.positions, plan.order >= 0, has_mask=prompt.mask is not None)
        return plan

    def check_call(self, plan: Plan, cache: Cache | None) -> None:
        """Check the model and ``cache`` as they are at the call, by what the host knows.

        Raises:
            RerouteError: the model was changed since ``enable``, or the cache cannot be used.
        """
        schedule = plan.schedule
        mask_format_of(self.adapter.text_config)
        self.adapter.check_layers(sorted({*schedule.looks, *(decision.score_layer for decision in plan.decisions)}))
        for decision in plan.decisions:
            decision.ranker.check(self.adapter, decision.score_layer)
        if cache is not None:
            check_cache(cache, range(schedule.layers[0], len(self.adapter.layers)))
        if plan.past and cache is not None:
            check_whole(cache, len(self.adapter.layers))
        if plan.past and (schedule.position_mode == "renumbered" or is_renumbered(cache)):
            raise RerouteError("position_mode='renumbered' is defined for one prompt only. Start a new cache.")

    def plan_call(
        self, kwargs: Kwargs, settings: Settings, labels: torch.Tensor | None, end: int | None
    ) -> Plan | None:
        """Plan a call of the base model with ``kwargs``, by name; None if there is nothing to route.

        Raises:
            RerouteError: this call cannot be routed.
        """
        ids, cache = kwargs.get("input_ids"), cache_of(kwargs)
        if ids is None:
            if kwargs.get("inputs_embeds") is not None and kwargs["inputs_embeds"].shape[1] > 1:
                self._warn(
                    "the prompt came as inputs_embeds, which do not show where visual tokens are. If it has any, pass "
                    "input_ids, or call the model in handle.using(handle.plan(input_ids))"
                )
            return None
        if ids.shape[1] == 1 or not has_picture(kwargs):
            return None
        if labels is not None and labels.shape != ids.shape:
            labels = None
        prompt = Prompt(ids, kwargs.get("attention_mask"), kwargs.get("position_ids"), cache, labels, end)
        plan = self.plan(prompt, settings)
        if plan is None:
            self._warn(f"there is a picture, but none of its placeholders {self.adapter.visual_ids} in input_ids")
        elif not plan.changes_nothing:
            self._check_others(kwargs, plan)
        return plan

    def check_given(self, plan: Plan, kwargs: Kwargs, labels: torch.Tensor | None) -> None:
        """Check a call of the base model that shall use ``plan``, which was made ahead.

        Raises:
            RerouteError: the plan was made for another call.
        """
        ids, cache = kwargs.get("input_ids"), cache_of(kwargs)
        batch, length = (kwargs["inputs_embeds"] if ids is None else ids).shape[:2]
        past = past_length(cache)
        if (batch, length, past) != (plan.batch, plan.length, plan.past):
            raise RerouteError(
                f"The plan in use is for tokens (batch, length) = {plan.batch, plan.length} after {plan.past} in the "
                f"cache; this call has {batch, length} after {past}. Make a plan of its own for it, or call the model "
                "outside of handle.using(plan)."
            )
        if plan.changes_nothing:
            return  # nothing is ranked
        if labels is not None and not plan.knows_labels:
            raise RerouteError(
                "The plan in use does not know the labels of this call, whose answer would rank the picture. Pass "
                "labels= to handle.plan too."
            )
        self.check_call(plan, cache)
        self._check_others(kwargs, plan)

    def check_follower(self, kwargs: Kwargs, cache: Cache, tokens: torch.Tensor) -> None:
        """Check a call of the base model with ``tokens`` (B, L, …) after a routed ``cache``, with a plan or without.

        Raises:
            RerouteError: the attention cannot be routed, the cache is not whole, or an argument has an entry for each
                of its tokens.
        """
        mask_format_of(self.adapter.text_config)
        check_whole(cache, len(self.adapter.layers))
        keys = past_length(cache) + tokens.shape[1]
        check_tokens_of_others(kwargs, self.adapter.base_parameters, (keys, len(tokens) * keys))

    def _check_others(self, kwargs: Kwargs, plan: Plan) -> None:
        keys = plan.past + plan.length
        counts = (plan.length, keys, plan.batch * plan.length, plan.batch * keys, sum(plan.lengths))
        check_tokens_of_others(kwargs, self.adapter.base_parameters, counts)

    def _warn(self, why: str) -> None:
        if why not in self._warned:
            self._warned.add(why)
            warnings.warn(f"Routing is enabled, but nothing was routed: {why}.", stacklevel=2)


def has_picture(kwargs: Kwargs) -> bool:
    """Whether a call with ``kwargs`` brings a picture. Placeholders without one are text, for Transformers too."""
    given = (value for name, value in kwargs.items() if any(part in name for part in PICTURES))
    return any(value is not None and (not isinstance(value, Mapping) or bool(value)) for value in given)


def _valid(prompt: Prompt) -> Any:
    """(B, L) False at padding; None if the mask does not say."""
    mask = prompt.mask
    if mask is None:
        return np.ones(prompt.ids.shape, dtype=bool)
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return None
    return mask[:, -prompt.ids.shape[1] :].cpu().numpy().astype(bool)


def _prompt_ends(prompt: Prompt, is_visual: Any, past: int) -> Sequence[int]:
    """One past the last prompt token of each sample: answers that are already there must not rank the picture."""
    batch, length = is_visual.shape
    if prompt.end is not None:
        return [min(length, prompt.end - past)] * batch
    if prompt.labels is None:
        return [length] * batch
    ends = []
    for row, labels in zip(is_visual, prompt.labels.cpu().numpy(), strict=True):
        picture = np.flatnonzero(row).max() if row.any() else length  # without one nothing is ranked
        answer = np.flatnonzero(labels[picture + 1 :] != -100)
        # Labels from the picture on leave no question: then all of the text is the prompt.
        ends.append(int(picture + 1 + answer[0]) if len(answer) and answer[0] > 0 else length)
    return ends
