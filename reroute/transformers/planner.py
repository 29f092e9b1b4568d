"""From a call of the base model to the plan of its prefill: what is visual, where the prompt ends, what is refused.

Everything is refused here, before anything of the model, the cache or the pool has changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache

from ..config import Settings
from ..core.plan import Plan, plan_tokens, visual_mask
from ..errors import RerouteError, UnsupportedCacheError
from .adapters import ModelAdapter
from .attention import mask_format_of
from .cache import (
    cache_of,
    check_cache,
    check_whole,
    has_quantized,
    is_renumbered,
    is_routed,
    is_static,
    past_length,
    routed_layers,
    states_of,
)
from .layer_kinds import attended_layers, check_attention, check_kinds, check_prompt, check_turn
from .packing import check_one_prompt_per_row, check_tokens_of_others
from .parallel import check_tower
from .prompt import Prompt, has_picture, prompt_ends, valid_tokens
from .turns import chooses_again, reopened_states, with_earlier

__all__ = ["Planner"]

Kwargs = Mapping[str, Any]


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
                "position_mode='renumbered' needs one position id per token, from which rotary tables are made, and "
                "this model has three (M-RoPE), or embeds positions. Use position_mode='preserved'."
            )
        if settings.keeps_all:
            return  # the plain model, whatever its attention
        reopens = settings.config.reopens
        if reopens and settings.needs_vision:
            raise RerouteError(
                "With reopens=True later turns choose again, and rankers that look at the vision tower would find none "
                "of what it computed. Choose other rankers, or reopens=False."
            )
        first = schedule.first_look if reopens else schedule.layers[0]
        if first < adapter.first_layer:
            raise RerouteError(
                f"Features of the pictures come between layers, the last ones before layer {adapter.first_layer}, and "
                f"the first layer that {'looks or routes' if reopens else 'routes'} is {first}. Decide from layer "
                f"{adapter.first_layer} on."
            )
        compact = range(first, len(adapter.layers))
        check_kinds(adapter, schedule, compact)
        adapter.check_facts(sorted(attended_layers(schedule)), compact, schedule.first_look)
        is_mixed = adapter.has_several_tables or any(map(adapter.slides, compact))
        is_mixed = is_mixed or adapter.reads_kinds or not all(map(adapter.attends, compact))
        if is_mixed and (reopens or schedule.position_mode == "renumbered"):
            raise RerouteError(
                f"{'reopens=True' if reopens else 'renumbered positions'} is not built for layers that slide, keep a "
                "state, have rotary tables of their own or are told the kinds of tokens. Use reopens=False and "
                "position_mode='preserved'."
            )
        if settings.needs_vision:
            adapter.tower.wanted_by(schedule.rankers)
            self._check_tower()
        for layer, ranker in zip(schedule.layers, schedule.rankers, strict=True):
            ranker.check(adapter, layer + ranker.layer_offset)
        check_attention(adapter, compact)  # each forward asks again

    def plan(self, prompt: Prompt, settings: Settings, *, has_picture: bool = True) -> Plan | None:
        """Plan a prefill; the only place that waits for the device. None without visual tokens.

        ``has_picture``: whether the call brings one. Its placeholders are text if not, for Transformers too.

        Raises:
            RerouteError: this prompt cannot be routed.
        """
        is_visual = self._visual(prompt, has_picture=has_picture)
        earlier = reopened_states(prompt, settings)
        if earlier is None and not is_visual.any():
            return None
        past, reopened = past_length(prompt.cache), 0
        valid = valid_tokens(prompt)
        if earlier is not None:
            past, reopened = earlier.start, earlier.count
            is_visual, valid = with_earlier(earlier, prompt, is_visual, valid)
        plan = plan_tokens(
            is_visual,
            np.ones_like(is_visual) if valid is None else valid,
            settings.schedule,
            settings.config.action,
            past=past,
            reopened=reopened,
            prompt_ends=prompt_ends(prompt, is_visual, past, reopened),
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
            own = plan.order[:, reopened:] >= 0
            has_mask, axes = prompt.mask is not None, self.adapter.position_axes
            check_one_prompt_per_row(prompt.positions, own, has_mask=has_mask, axes=axes)
        return plan

    def _visual(self, prompt: Prompt, *, has_picture: bool) -> Any:
        """(B, L) True at visual tokens. Waits for the device."""
        if prompt.visual is not None:
            return prompt.visual.cpu().numpy()
        if self.adapter.marks is not None:
            raise RerouteError(
                f"Visual tokens of {type(self.adapter.base).__name__} have no ids of their own: pass "
                f"visual_mask={self.adapter.marks}.bool() instead of input_ids."
            )
        assert prompt.ids is not None
        return visual_mask(prompt.ids.cpu().numpy(), self.adapter.visual_ids if has_picture else ())

    def check_call(self, plan: Plan, cache: Cache | None) -> None:
        """Check the model and ``cache`` as they are at the call, by what the host knows.

        Raises:
            RerouteError: the model was changed since ``enable``, or the cache cannot be used.
        """
        self.adapter.read_kinds()
        schedule = plan.schedule
        compact = range(schedule.first_look if plan.reopened else schedule.layers[0], len(self.adapter.layers))
        check_attention(self.adapter, compact)
        self.adapter.check_layers(sorted(attended_layers(schedule)))
        check_prompt(self.adapter, plan, compact)
        for decision in plan.decisions:
            decision.ranker.check(self.adapter, decision.score_layer)
        if any(decision.ranker.needs_vision for decision in plan.decisions):
            self._check_tower()
        if cache is not None:
            keeping = [index for index in compact if not self.adapter.is_row_by_row(index)]
            check_cache(cache, keeping, self.adapter.slides, self.adapter.is_recurrent)
            self._check_static(cache)
        if plan.past + plan.reopened and cache is not None:
            check_whole(cache, len(self.adapter.layers))
            check_turn(self.adapter, plan, compact)
        if plan.reopened and plan.past and has_quantized(cache):
            raise UnsupportedCacheError(
                "A later turn that chooses again needs the rows of the text before the first picture as they were, "
                "and this cache has quantised them. Put that text into the call of the first picture, or use a "
                "DynamicCache."
            )
        kept = states_of(cache)
        if plan.reopened and (kept is None or (kept.start, kept.layer) != (plan.past, schedule.first_look)):
            raise RerouteError("The plan in use chooses again, and not for this cache. Make one with cache=.")
        if plan.past and (schedule.position_mode == "renumbered" or is_renumbered(cache)):
            raise RerouteError("position_mode='renumbered' is defined for one prompt only. Start a new cache.")

    def _check_tower(self) -> None:
        tower = self.adapter.tower
        check_tower((tower.module, tower.projector), self.adapter.ranks)

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
                if settings.config.reopens and is_routed(cache):
                    raise RerouteError(
                        "A turn that chooses again must show where its visual tokens are, and inputs_embeds do not. "
                        "Pass input_ids, or call the model in handle.using(handle.plan(visual_mask=…, cache=cache))."
                    )
                self._warn(
                    "the prompt came as inputs_embeds, which do not show where visual tokens are. If it has any, pass "
                    "input_ids, or call the model in handle.using(handle.plan(visual_mask=…))"
                )
            return None
        if labels is not None and labels.shape != ids.shape:
            labels = None
        brings, marks = has_picture(kwargs), self.adapter.marks
        visual = None if marks is None else _marked(kwargs.get(marks) if brings else None, ids)
        given = ids if visual is None else None
        prompt = Prompt(given, kwargs.get("attention_mask"), kwargs.get("position_ids"), cache, labels, end, visual)
        if not ((brings and ids.shape[1] > 1) or chooses_again(prompt, settings)):
            return None
        plan = self.plan(prompt, settings, has_picture=brings)
        if plan is None and brings:
            where = f"of its placeholders {self.adapter.visual_ids} in input_ids" if marks is None else f"in {marks}"
            self._warn(f"there is a picture, but none {where}, or all are hidden as padding")
        elif plan is not None and not plan.changes_nothing:
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
        its_past = plan.past + plan.reopened
        if (batch, length, past) != (*plan.shape, its_past):
            raise RerouteError(
                f"The plan in use is for tokens (batch, length) = {plan.shape} after {its_past} in the "
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
        self.adapter.read_kinds()
        check_attention(self.adapter, routed_layers(cache))
        check_whole(cache, len(self.adapter.layers))
        self._check_static(cache)
        _check_shared(kwargs)

        def counts() -> tuple[int, ...]:
            keys = past_length(cache) + tokens.shape[1]
            return keys, len(tokens) * keys

        check_tokens_of_others(kwargs, self.adapter.base_parameters, counts)

    def _check_others(self, kwargs: Kwargs, plan: Plan) -> None:
        _check_shared(kwargs)
        keys = plan.past + plan.length
        valid = int((plan.order[:, plan.reopened :] >= 0).sum())
        counts = (plan.shape[1], keys, plan.batch * plan.shape[1], plan.batch * keys, valid)
        check_tokens_of_others(kwargs, self.adapter.base_parameters, lambda: counts)

    def _check_static(self, cache: Cache) -> None:
        kind = mask_format_of(self.adapter.text_config) if is_static(cache) else "boolean"
        if kind == "padding":
            raise UnsupportedCacheError(
                "Flash attention tells the rows of a static cache by their number, and routed layers have fewer. Call "
                "model.set_attn_implementation('sdpa'), or use a DynamicCache."
            )
        if kind == "block":
            raise UnsupportedCacheError(
                "Transformers' block masks read the length of a static cache when its layers have changed it already, "
                "and show a row too many. Call model.set_attn_implementation('sdpa'), or use a DynamicCache."
            )

    def _warn(self, why: str) -> None:
        if why not in self._warned:
            self._warned.add(why)
            warnings.warn(f"Routing is enabled, but nothing was routed: {why}.", stacklevel=2)


def _marked(mask: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
    """(B, L) True where ``mask`` marks one of the tokens of this call, ``ids`` (B, L)."""
    return torch.zeros_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def _check_shared(kwargs: Kwargs) -> None:
    """RerouteError if the call asks for keys of its layers, for a model that has none of its own."""
    if kwargs.get("return_shared_kv_states"):
        raise RerouteError(
            "return_shared_kv_states asks for the keys of all tokens, and routed layers lack some. Generate without an "
            "assistant that reads them, or disable routing."
        )
