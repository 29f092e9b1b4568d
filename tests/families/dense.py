"""What routing must compute, for any decoder: its own layers in eager mode on the full-length sequence, under masks.

No cache, nothing of the product. A deferred row keeps the state that it has and is nobody's key. Layers that keep a
state have no mask for that: they run on the other rows, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from models import TRANSFORMERS
from tiny_types import PICTURE, TinyType
from torch import Tensor

__all__ = ["Predicted", "near", "predict"]


@dataclass(frozen=True)
class Predicted:
    """``logits`` (L, V); ``kept`` of each decision, indices into the visual tokens; the closest call of all."""

    logits: Tensor
    kept: list[list[int]]
    margin: float


@torch.no_grad()
def predict(
    tiny: TinyType,
    ids: Sequence[int],
    layers: Sequence[int],
    ratios: Sequence[float],
    *,
    prompt: int | None = None,
    action: str = "route",
    chosen: Sequence[list[int]] | None = None,
    ranks: Mapping[int, Callable[[Tensor], Tensor]] = MappingProxyType({}),
    **given: Any,
) -> Predicted:
    """Of a prompt of ``prompt`` tokens (default: all ``ids``) and what was generated after it.

    ``chosen``: what each decision kept, where it was not ranked with all tokens before it, as in later turns.
    ``ranks``: scores (L,) of hidden states (L, C), of decisions that are not made by attention.
    """
    prompt = len(ids) if prompt is None else prompt
    dense, calls = _inputs(tiny, ids, given)
    if tiny.later is not None:
        rows = torch.arange(len(ids))
        gone = (rows >= prompt) & (rows <= rows[:, None] - tiny.later)
        calls = [_hiding(kwargs, gone) for kwargs in calls]
    visual = [i for i, token in enumerate(ids[:prompt]) if token == PICTURE]
    active, there = torch.ones(len(ids), dtype=torch.bool), torch.ones(len(ids), dtype=torch.bool)
    candidates, margin = list(range(len(visual))), float("inf")
    kept: list[list[int]] = []
    for index, (layer, kwargs) in enumerate(zip(tiny.layers, calls, strict=True)):
        if index == 0 or (index <= layers[0] and tiny.later is None):  # features of pictures may have come between
            states = dense[index]
        if index in layers:
            if chosen is None:
                by = ranks.get(index)
                scores = by(states[0]) if by else _attention(layer, states, _hiding(kwargs, ~there))[prompt - 1]
                ranked = sorted(candidates, key=lambda i: (-float(scores[visual[i]]), i))
                count = max(1, int(len(visual) * ratios[len(kept)]))
                if count < len(ranked):
                    margin = min(margin, float(scores[visual[ranked[count - 1]]] - scores[visual[ranked[count]]]))
            kept.append(sorted(ranked[:count]) if chosen is None else chosen[len(kept)])
            active[visual] = False
            active[[visual[i] for i in kept[-1]]] = True
            if action == "remove":
                candidates, there = kept[-1], active.clone()
        if _part(layer) is not None:
            states = torch.where(active[:, None], _first(layer(states, **_hiding(kwargs, ~active))), states)
        else:
            states = states.clone()
            states[:, active] = layer(states[:, active], **kwargs)
    with _hook(tiny.layers[-1], lambda _, __, output: (states,) if isinstance(output, tuple) else states):
        return Predicted(tiny.model(torch.tensor([ids]), **_options(tiny, ids, given), **given).logits[0], kept, margin)


def _inputs(tiny: TinyType, ids: Sequence[int], given: Any) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """What each layer gets without routing, and its keyword arguments."""
    seen: list[tuple[Tensor, dict[str, Any]]] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args[0], kwargs)), with_kwargs=True)
        for layer in tiny.layers
    ]
    tiny.model(torch.tensor([ids]), **_options(tiny, ids, given), **given)
    for handle in handles:
        handle.remove()
    return [hidden for hidden, _ in seen], [dict(kwargs) for _, kwargs in seen]


def _options(tiny: TinyType, ids: Sequence[int], given: Any) -> dict[str, Any]:
    """Position ids too, unless they depend on the pictures ``given``."""
    options = {"use_cache": False, "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    positions = torch.arange(len(ids))[None]
    if tiny.marks is not None:
        options[tiny.marks] = (torch.tensor([ids]) == PICTURE).long()
    if given:
        return options
    return {**options, "position_ids": tiny.spread(positions)}


def _hiding(kwargs: dict[str, Any], gone: Tensor) -> dict[str, Any]:
    """The arguments of a layer in which nobody sees the rows that are ``gone``."""
    return {**kwargs, "attention_mask": kwargs["attention_mask"].masked_fill(gone, torch.finfo(torch.float32).min)}


def _part(layer: Any) -> Any:
    """Its attention, if it has one."""
    if hasattr(layer, "self_attn"):
        return layer.self_attn
    mixer = getattr(layer, "mixer", None)
    return mixer if hasattr(mixer, "q_proj") else None


def _first(output: Any) -> Tensor:
    """The hidden states of what a layer returns."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _attention(layer: Any, states: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """(L, L): what each row pays each row, mean over heads."""
    seen: list[Tensor] = []
    with _hook(_part(layer), lambda _, __, output: seen.append(output[1])):
        layer(states, **kwargs)
    return seen[0][0].mean(0)


class _hook:
    def __init__(self, module: Any, act: Any) -> None:
        self._handle = module.register_forward_hook(act)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


NEAR = 1e-5 if TRANSFORMERS >= (5, 24) else 3e-5
"""Recurrent layers of earlier releases, of Qwen3.5 above all, round more."""
OF_STATES = 3e-5
"""Layers that keep a state round it in each step, to fp32 in a model of float64 too, by how much depends on the CPU."""


def near(actual: Tensor, expected: Tensor, *, share: float = NEAR) -> None:
    """Equal but for the order of fp32 arithmetic: to ``share`` of the largest. Some may be no logits, but forbidden."""
    forbidden = expected == torch.finfo(expected.dtype).min
    assert torch.equal(actual == torch.finfo(expected.dtype).min, forbidden)
    actual, expected = actual.masked_fill(forbidden, 0), expected.masked_fill(forbidden, 0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=share * max(1.0, float(expected.abs().max())))
