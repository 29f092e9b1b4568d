"""What was found out about the layers of a decoder, kept for as long as it lives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...errors import UnsupportedModelError
from .dry_run import ROWS, DryRun, Inputs, layers_get, on_cpu, rows
from .facts import LayerFacts, layer_facts, refusal
from .layer_parts import LayerParts
from .proof import prove
from .recurrent import check_recurrent
from .scoring_layer import check_parts
from .tables import tables_in

if TYPE_CHECKING:
    from .base import ModelAdapter

__all__ = ["Layers"]

_known: WeakKeyDictionary[nn.Module, Layers] = WeakKeyDictionary()


class Layers:
    """Facts of layers by what they are made of, so that a layer that was changed is looked at anew."""

    def __init__(self) -> None:
        """Nothing is known."""
        self._facts: dict[Any, LayerFacts] = {}
        self._proved: dict[Any, LayerFacts] = {}
        self._recurrent: set[Any] = set()
        self._kinds: dict[Any, object] = {}

    @classmethod
    def of(cls, text: nn.Module) -> Layers:
        """Those of a decoder."""
        return _known.setdefault(text, cls())

    def facts(self, adapter: ModelAdapter, index: int, *, like_others: bool = False) -> LayerFacts:
        """The facts of layer ``index``; ``like_others``: or of one that differs from it by its place alone.

        Raises:
            UnsupportedModelError: they cannot be found out.
        """
        key = self._key(adapter, index, has_place=not like_others)
        if key not in self._facts:
            with on_cpu():
                run, inputs = _dry_run(adapter, index)
                self._facts[key] = layer_facts(adapter, index, run, inputs)
        return self._facts[key]

    def check_recurrent(self, adapter: ModelAdapter, index: int) -> None:
        """Check that layer ``index``, which keeps a state, can run on the rows that are there.

        Raises:
            UnsupportedModelError: it cannot.
        """
        key = self._key(adapter, index, has_place=False)
        if key not in self._recurrent:
            with on_cpu():
                run = DryRun(adapter.layers[index], adapter.mixer(index))
                hidden, ids = rows(adapter.text_config.hidden_size)
                has_tables = _calls(adapter, hidden, ids)[index][1].get("position_embeddings") is not None
                check_recurrent(adapter.layers[index], index, run, hidden, ids, has_tables=has_tables)
            self._recurrent.add(key)

    def check_calls(self, adapter: ModelAdapter, compact: Sequence[int], first: int) -> bool:
        """Check what the decoder gives to the layers that run ``compact``, which is cut to the rows that are there.

        Masks and rotary tables may differ from layer to layer, or a layer has none. Returns whether any has other
        tables than the layer ``first``.

        Raises:
            UnsupportedModelError: layers get something else for each token.
        """
        if not compact:
            return False
        with on_cpu():
            calls = _calls(adapter, *rows(adapter.text_config.hidden_size))
        for index in compact:
            args, kwargs = calls[index]
            others = [name for name, value in kwargs.items() if name not in CUT and _has_rows(value)]
            if others or any(map(_has_rows, args)):
                what = ", ".join(others) or "more than its hidden states by position"
                raise refusal(f"it gets {what}, with an entry for each token", adapter.layers[index], index)
        tables = [kwargs.get("position_embeddings") for _, kwargs in calls]
        return not all(its is None or _same(its, tables[first]) for its in tables)

    def with_mask(self, adapter: ModelAdapter, *, chunks: bool) -> frozenset[int]:
        """The layers to which the decoder gives a mask in which a token sees all before it, or that of its chunk.

        Windows and chunks of its configuration are short meanwhile.

        Raises:
            UnsupportedModelError: it cannot be run without its layers.
        """
        with on_cpu():
            ids, settings = torch.arange(ROWS), {"attention_chunk_size": CHUNK, "sliding_window": CHUNK}
            calls = _calls(adapter, rows(adapter.text_config.hidden_size)[0], ids[None], **settings)
            visible = ids[:, None] >= ids
            if chunks:
                visible &= ids[:, None] // CHUNK == ids // CHUNK
            masks = (kwargs.get("attention_mask") for _, kwargs in calls)
            are = (isinstance(mask, Tensor) and torch.equal(mask[0, 0] == 0, visible) for mask in masks)
            return frozenset(index for index, its in enumerate(are) if its)

    def proved(self, adapter: ModelAdapter, index: int) -> LayerFacts:
        """The facts of layer ``index``, from which scores were proved to be those of its attention.

        Raises:
            UnsupportedModelError: they are not, or the facts cannot be found out.
        """
        key = self._key(adapter, index, has_place=True)
        if key not in self._proved:
            with on_cpu():
                run, inputs = _dry_run(adapter, index)
                facts = layer_facts(adapter, index, run, inputs)
                prove(adapter, facts, index, run, inputs)
            self._facts[key] = self._proved[key] = facts
        return self._proved[key]

    def _key(self, adapter: ModelAdapter, index: int, *, has_place: bool) -> Any:
        """What the facts of a layer depend on. UnsupportedModelError if it attends and lacks a part."""
        parts = adapter.parts.get(index)
        if parts is None or not parts.still_are:
            layer, mixer = adapter.layers[index], adapter.mixer(index)
            if adapter.attends(index):
                check_parts(layer, index, mixer)
            parts = adapter.parts[index] = LayerParts(layer, mixer, self._kinds)
        return type(adapter), has_place and index, parts.kind


CUT = ("attention_mask", "position_embeddings", "position_ids")
"""Arguments of layers that are cut to the rows that are there."""


def _has_rows(value: Any) -> bool:
    return any(ROWS in leaf.shape for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _same(one: Any, other: Any) -> bool:
    leaves, others = tree_leaves(one), tree_leaves(other)
    return len(leaves) == len(others) and all(a is b for a, b in zip(leaves, others, strict=True))


CHUNK = 7
"""Of masks that are looked at: several to the rows of a run, and the last one shorter."""


def _calls(
    adapter: ModelAdapter, hidden: Tensor, ids: Tensor, **settings: Any
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What the decoder calls each of its layers with, for rows at position ``ids`` (1, R).

    ``settings`` replace those of its configuration.

    Raises:
        UnsupportedModelError: it cannot be run without its layers.
    """
    try:
        ids = ids if adapter.position_axes == 1 else ids.expand(adapter.position_axes, -1, -1)
        return layers_get(adapter.text, hidden, ids, settings)
    except Exception as error:
        raise UnsupportedModelError(
            f"The decoder {type(adapter.text).__name__} cannot be run without its layers, to see what it gives "
            f"them ({type(error).__name__}: {error}). Disable routing for this model."
        ) from None


def _dry_run(adapter: ModelAdapter, index: int) -> tuple[DryRun, Inputs]:
    """A layer, and random rows for it with the rotary tables that the decoder gives it."""
    layer = adapter.layers[index]
    run = DryRun(layer, adapter.attention)
    hidden, ids = rows(adapter.text_config.hidden_size)
    tables = _calls(adapter, hidden, ids)[index][1].get("position_embeddings")
    if tables is not None and not (tables_in(tables) and all(map(_has_rows, tree_leaves(tables)))):
        raise refusal("its decoder gives it rotary tables of another form than is known", layer, index)
    return run, Inputs.of(hidden, tables, ids)
