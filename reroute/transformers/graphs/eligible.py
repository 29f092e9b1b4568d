"""Why a prefill is not replayed but runs eagerly, in clauses: by facts of the model, and by what its call asks for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import chain
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as torch_module

from reroute_kernels import Backend
from reroute_kernels.streams import is_capturing, stream_on

from ...config import Settings
from ...core.home import is_recorded
from ...core.plan import Plan
from ...errors import RerouteError
from ..adapters import Features, ModelAdapter
from ..attention import mask_format_of
from ..cache import cache_of, can_fill
from ..forward import Kwargs
from ..packing import is_packed
from .decoder_state import HOOKS, DecoderState, forward_of, has_hooks_of_others
from .masks import are_known, masks_in

__all__ = ["why_not_call", "why_not_decoder", "why_not_model", "why_not_prompt"]

KNOWN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache", "past_key_values", "use_cache")
"""Arguments of a decoder that a graph has a place for; of all others it knows nothing."""
OF_HEADS = ("logits_to_keep",)
"""Arguments that some base models pass on to their decoder, which does not look at them if it has no such one."""
SHARING = "num_kv_shared_layers"
"""Of a configuration: how many layers have no keys of their own. Only before these does Gemma 4 look at such arguments.
"""
OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
EXPERTS = ("grouped_mm", "batched_mm")
"""Transformers' ways to run mixtures of experts that read nothing on the host; the first is what it chooses."""
HOST_READS = frozenset({"item", "tolist", "nonzero", "numpy", "cpu", "unique", "unique_consecutive", "masked_select"})
"""What code calls that reads values of tensors on the host, or makes shapes of them."""


def why_not_prompt(
    adapter: ModelAdapter, plan: Plan, named: Mapping[str, Any], labels: torch.Tensor | None, *, is_given: bool
) -> str:
    """Why a call of the base model is not replayed, by its arguments ``named``; empty if it may be.

    ``is_given``: whether ``plan`` was made ahead.
    """
    if is_given:
        return "its plan was made ahead (handle.using), as for a graph that is captured by hand"
    if labels is not None:
        return "it has labels"
    if plan.past or plan.reopened:
        return "it is a later turn"
    has_mask = named.get("attention_mask") is not None
    # Of a plan that changes something the planner has refused such rows.
    ids, axes = named.get("position_ids"), adapter.position_axes
    if plan.changes_nothing and is_packed(ids, plan.order >= 0, has_mask=has_mask, axes=axes):
        return "several prompts are packed in one row"
    return _padding(adapter, plan)


def _padding(adapter: ModelAdapter, plan: Plan) -> str:
    """Why ``plan`` cannot be replayed, in whose graph there is no padding, if layers would see where that was."""
    if min(plan.lengths) == plan.length:
        return ""
    is_token = plan.order >= 0
    has_holes = bool((np.diff(is_token, axis=1, prepend=False, append=False).sum(1) > 2).any())
    if adapter.recurrent and (has_holes or not is_token[:, -1].all()):
        return "there is padding behind tokens, which changes what layers keep of them"
    if has_holes:
        with suppress(RerouteError):  # of layers that are not known, which is said of the model
            if any(adapter.reach(layer) is not None for layer in adapter.attending):
                return "there is padding between tokens, which windows and chunks count"
    return ""


def why_not_model(adapter: ModelAdapter, settings: Settings, backend: Backend, state: DecoderState) -> str:
    """Why no prefill of this model under ``settings`` is replayed; empty if some are. ``state``: of its decoder."""
    routing = () if settings.keeps_all else _routing(adapter, settings, backend)
    return why_not_decoder(adapter, state) or next(iter(routing), "")


def why_not_decoder(adapter: ModelAdapter, state: DecoderState) -> str:
    """The same, whatever the settings are."""
    return next(chain(_decoder(adapter, state), _attention(adapter)), "")


def _decoder(adapter: ModelAdapter, state: DecoderState) -> Iterator[str]:
    text = adapter.text
    if len(state.devices) > 1:
        yield f"its decoder is spread over {', '.join(sorted(map(str, state.devices)))}"
    if has_hooks_of_others(text):
        yield "its modules have hooks or wrappers, are compiled or offloaded, and a replay runs no Python of theirs"
    if state.is_training:
        yield "its decoder is in training mode"
    if adapter.decoder_embeds:
        yield "its decoder makes hidden states of ids and pictures itself"
    if adapter.reads_kinds:
        yield "its layers are told the kinds of tokens"
    looks = [name for name in OF_HEADS if name in adapter.text_parameters]
    if looks and getattr(adapter.text_config, SHARING, None) != 0:
        yield f"its decoder looks at {', '.join(looks)}"
    reading = sorted(_reading_on_the_host(text))
    if reading:
        yield f"{', '.join(reading)} read values on the host"


def _attention(adapter: ModelAdapter) -> Iterator[str]:
    try:
        if mask_format_of(adapter.text_config) in ("additive", "block"):
            name = adapter.text_config._attn_implementation.removesuffix("_attention")
            yield f"{name} attention needs a mask of the prompt's own; 'sdpa' or flash attention do not"
        yield from _rotation(adapter)
        others = _other_layers(adapter)
    except RerouteError as error:
        yield f"not all of its layers are known: {error}"
        return
    for what, layers in others.items():
        if layers:
            yield f"layers {layers} {what}"


def _rotation(adapter: ModelAdapter) -> Iterator[str]:
    kinds = _rope_kinds(adapter)
    unknown = [kind for kind in kinds if "dynamic" in kind or "longrope" in kind]
    if unknown or (not kinds and any(map(adapter.rotates, adapter.attending))):
        yield f"its rotary tables depend on the largest position ({', '.join(unknown) or 'no kind of RoPE is named'})"


def _other_layers(adapter: ModelAdapter) -> dict[str, list[int]]:
    """Which layers attend to more than what comes before a token, or to a part that is not known; by what they do."""
    attending = adapter.attending
    later = [i for i in attending if not adapter.sees_only_before(i)]
    is_flash = mask_format_of(adapter.text_config) == "padding"
    return {
        "keep the first prompt apart from what comes later": [i for i in attending if adapter.keeps_prompt(i)],
        "see later tokens, for which flash attention has no mask": [i for i in attending if is_flash and i in later],
        "see later tokens without a mask, and others do not": later if len(later) < len(attending) else [],
        "attend in a way that is not known": [i for i in attending if not adapter.is_known_kind(i)],
    }


def _routing(adapter: ModelAdapter, settings: Settings, backend: Backend) -> Iterator[str]:
    config, schedule = settings.config, settings.schedule
    if config.trace:
        yield "trace=True asks for what a graph does not give out"
    if config.reopens:
        yield "reopens=True keeps hidden states that a graph does not give out"
    if schedule.looks:
        yield "its rankers make notes at other layers"
    others = {type(ranker).__name__ for ranker in schedule.rankers if not ranker.within_capacities(backend)}
    if others:
        yield f"{', '.join(sorted(others))} ranks by counts that the host has (backend {backend.name})"


def _reading_on_the_host(text: nn.Module) -> set[str]:
    """Names of classes of modules whose code does."""
    found = set()
    for kind, code, experts in {(type(module), _code_of(module), _experts_of(module)) for module in text.modules()}:
        reads = kind is not type(text) and code is not None and HOST_READS.intersection(code.co_names)
        if reads and experts not in EXPERTS:
            found.add(kind.__name__)
    return found


def _code_of(module: nn.Module) -> CodeType | None:
    return getattr(inspect.unwrap(forward_of(module)), "__code__", None)


def _experts_of(module: nn.Module) -> str | None:
    """What Transformers runs instead of the code of ``module``, if these are experts, and it has several ways to."""
    code = getattr(forward_of(module), "__code__", None)
    dispatches = code is not None and "_experts_implementation" in code.co_names
    return str(module.config._experts_implementation) if dispatches else None  # type: ignore[union-attr]


def _rope_kinds(adapter: ModelAdapter) -> list[str]:
    """By Transformers' names; none if the decoder has no rotary module that says it."""
    kinds: Any = getattr(getattr(adapter.text, "rotary_emb", None), "rope_type", None)
    if kinds is None:
        return []
    return [kinds] if isinstance(kinds, str) else list(map(str, kinds.values()))


def why_not_call(adapter: ModelAdapter, kwargs: Kwargs) -> str:
    """Why this call of the decoder with ``kwargs`` is not replayed; empty if it may be."""
    return next(_call(adapter, kwargs), "")


def _call(adapter: ModelAdapter, kwargs: Kwargs) -> Iterator[str]:
    embeds, cache = kwargs["inputs_embeds"], cache_of(kwargs)
    if type(embeds) is not torch.Tensor or torch._C._len_torch_dispatch_stack():
        yield "its tensors are not plain ones, or a dispatch mode looks at them"
    if is_capturing(stream_on(embeds.device)):
        yield "a capture runs, of which it becomes a part"
    if is_recorded(embeds, adapter.text.parameters()):
        yield "gradients are recorded"
    if torch.is_autocast_enabled(embeds.device.type):
        yield "autocast is on, and what it makes of weights is gone when it ends"
    if any(getattr(torch_module, f"_global{name}") for name in HOOKS):
        yield "there are hooks for all modules"
    features = Features.given(kwargs)
    known = {*KNOWN, *OF_HEADS}
    if features is not None:
        known |= {features.form.argument, features.form.mask}
    others = [name for name, value in kwargs.items() if name not in known and value is not None and value is not False]
    if others != ["return_dict"] * len(others):
        yield f"the decoder also gets {', '.join(others)}"
    asked = [name for name in OUTPUTS if getattr(adapter.text_config, name, False)]
    if asked or not getattr(adapter.text_config, "return_dict", True) or kwargs.get("return_dict") is False:
        yield f"it returns more, or otherwise, than is known ({', '.join(asked) or 'return_dict=False'})"
    mask = kwargs.get("attention_mask")
    masks = masks_in(mask)
    is_known = isinstance(mask, torch.Tensor | None) if masks is None else are_known(masks, embeds)
    if not is_known:
        yield "it has a mask of its own"
    if not _has_known_positions(adapter, kwargs.get("position_ids"), embeds.device):
        yield "its position ids are not of the form that is known for this model"
    if features is not None and not _are_rows(features, embeds):
        yield "features that come between its layers are no rows of embeddings on its device"
    if cache is not None and not can_fill(cache, embeds, adapter.recurrent):
        yield "its cache is not an empty DynamicCache or StaticCache of plain layers"


def _has_known_positions(adapter: ModelAdapter, positions: Any, device: torch.device) -> bool:
    if positions is None:
        return adapter.position_axes == 1
    if not isinstance(positions, torch.Tensor) or positions.dtype != torch.int64 or positions.device != device:
        return False
    if adapter.position_axes == 1:
        return positions.ndim == 2
    return positions.ndim == 3 and len(positions) - adapter.position_axes in (0, 1)  # that of text may come before


def _are_rows(features: Features, embeds: torch.Tensor) -> bool:
    """Whether there is one for each token that is marked cannot be seen on the host; ``Replays`` asks the plan."""
    tensors = features.mask, *features.levels
    shapes = {(level.ndim, *level.shape[-1:]) for level in features.levels}
    return (
        all(type(its) is torch.Tensor and its.device == embeds.device for its in tensors)
        and shapes == {(2, embeds.shape[-1])}
        and features.mask.shape == embeds.shape[:2]
    )
