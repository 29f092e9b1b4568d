"""What was found out about the layers of a decoder, kept for as long as it lives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...errors import UnsupportedModelError
from .dry_run import ROWS, DryRun, Inputs, layers_get, on_cpu, rotary_tables
from .facts import LayerFacts, layer_facts, refusal
from .proof import prove
from .scoring_layer import check_parts

if TYPE_CHECKING:
    from .base import ModelAdapter

__all__ = ["Layers"]

_known: WeakKeyDictionary[nn.Module, Layers] = WeakKeyDictionary()
_SIMPLE = (int, float, bool, str, type(None))
_STATES = ("training", "gradient_checkpointing")
"""Attributes that change no score."""


class Layers:
    """Facts of layers by what they are made of, so that a layer that was changed is looked at anew."""

    def __init__(self) -> None:
        """Nothing is known."""
        self._facts: dict[Any, LayerFacts] = {}
        self._proved: dict[Any, LayerFacts] = {}

    @classmethod
    def of(cls, text: nn.Module) -> Layers:
        """Those of a decoder."""
        return _known.setdefault(text, cls())

    def facts(self, adapter: ModelAdapter, index: int, *, like_others: bool = False) -> LayerFacts:
        """The facts of layer ``index``; ``like_others``: or of one that differs from it by its place alone.

        Raises:
            UnsupportedModelError: they cannot be found out.
        """
        check_parts(adapter.layers[index], index, adapter.attention)
        key = _key(adapter, index, has_place=not like_others)
        if key not in self._facts:
            with on_cpu():
                run, inputs = _dry_run(adapter, index)
                self._facts[key] = layer_facts(adapter.layers[index], adapter.attention, index, run, inputs)
        return self._facts[key]

    def check_calls(self, adapter: ModelAdapter, compact: Sequence[int]) -> None:
        """Check what the decoder gives to the layers that run ``compact``, which is cut to the rows that are there.

        Raises:
            UnsupportedModelError: layers get different masks or rotary tables, or something else for each token.
        """
        if not compact:
            return
        with on_cpu():
            _, inputs = _dry_run(adapter, compact[0])
            ids = inputs.ids if adapter.renumbers else inputs.ids.expand(3, -1, -1)
            try:
                calls = layers_get(adapter.text, inputs, ids)
            except Exception as error:
                raise UnsupportedModelError(
                    f"The decoder {type(adapter.text).__name__} cannot be run without its layers, to see what it gives "
                    f"them ({type(error).__name__}: {error}). Disable routing for this model."
                ) from None
        first = calls[compact[0]][1]
        for index in compact:
            args, kwargs = calls[index]
            others = [name for name, value in kwargs.items() if name not in CUT and _has_rows(value)]
            if others or any(map(_has_rows, args)):
                what = ", ".join(others) or "more than its hidden states by position"
                raise refusal(f"it gets {what}, with an entry for each token", adapter.layers[index], index)
            for name in ("attention_mask", "position_embeddings"):
                if not _same(kwargs.get(name), first.get(name)):
                    why = f"it gets another {name} than layer {compact[0]}, and routing gives all layers the same"
                    raise refusal(why, adapter.layers[index], index)

    def proved(self, adapter: ModelAdapter, index: int) -> LayerFacts:
        """The facts of layer ``index``, from which scores were proved to be those of its attention.

        Raises:
            UnsupportedModelError: they are not, or the facts cannot be found out.
        """
        check_parts(adapter.layers[index], index, adapter.attention)
        key = _key(adapter, index, has_place=True)
        if key not in self._proved:
            with on_cpu():
                run, inputs = _dry_run(adapter, index)
                facts = layer_facts(adapter.layers[index], adapter.attention, index, run, inputs)
                prove(adapter, facts, index, run, inputs)
            self._facts[key] = self._proved[key] = facts
        return self._proved[key]


CUT = ("attention_mask", "position_embeddings", "position_ids")
"""Arguments of layers that are cut to the rows that are there."""


def _has_rows(value: Any) -> bool:
    return any(ROWS in leaf.shape for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _same(one: Any, other: Any) -> bool:
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(a is b for a, b in pairs)


def _dry_run(adapter: ModelAdapter, index: int) -> tuple[DryRun, Inputs]:
    layer = adapter.layers[index]
    run = DryRun(layer, adapter.attention)

    def tables(hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        given = ids if adapter.renumbers else ids.expand(3, -1, -1)
        try:
            cos, sin = rotary_tables(adapter.text.rotary_emb, hidden, given)
        except Exception as error:
            why = f"its decoder makes no rotary tables of position ids alone ({type(error).__name__}: {error})"
            raise refusal(why, layer, index) from None
        return cos, sin

    return run, run.inputs(adapter.text_config.hidden_size, tables)


def _key(adapter: ModelAdapter, index: int, *, has_place: bool) -> Any:
    """What the facts of a layer depend on: its code, and that of what it calls before attention, and their settings."""
    layer = adapter.layers[index]
    attention = getattr(layer, adapter.attention)
    parts = (layer, *layer.children(), *attention.modules())
    return type(adapter), has_place and index, tuple(_about(part) for part in parts)


def _about(module: Any) -> Any:
    simple = ((name, value) for name, value in vars(module).items() if isinstance(value, _SIMPLE))
    settings = tuple(item for item in simple if item[0] not in _STATES and item[0] != "layer_idx")
    weights = tuple(weight.shape for weight in module._parameters.values() if isinstance(weight, torch.Tensor))
    return type(module).forward, settings, weights, tuple(module._modules)
