"""What layers that lack rows get with new tokens, instead of what their decoder gives to all layers."""

from __future__ import annotations

from typing import Any

import torch

from .adapters import ModelAdapter, in_form_of
from .attention import decode_mask, mask_format_of
from .cache import RoutedLayer

__all__ = ["StageArguments"]


class StageArguments:
    """Of one forward: made for the first layer of a stage, and shared by the others. Dynamo may trace it."""

    def __init__(self, adapter: ModelAdapter) -> None:
        """No layer has come yet."""
        self._adapter = adapter
        self._masks: list[tuple[RoutedLayer, int, Any, torch.Tensor]] = []
        self._places: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    def adapt(self, layer: RoutedLayer, hidden: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """Change ``kwargs`` of the decoder layer that gets ``hidden`` (B, L, C) and stores in ``layer``, in place.

        The mask becomes that of the columns which ``layer`` holds; nothing where there is none. Renumbered positions go
        on as they were counted.
        """
        mask, first = kwargs.get("attention_mask"), layer.first_visible
        if mask is not None or layer.rows.has_fillers or first:
            kwargs["attention_mask"] = self._mask(layer, mask, hidden.shape[1], first)
        if layer.rows.position_offset is not None:
            kwargs.update(self._renumbered(layer.rows.stage_key, layer.rows.position_offset, hidden, kwargs))

    def _mask(self, layer: RoutedLayer, mask: Any, new: int, first: int) -> torch.Tensor:
        """``mask``, or one that shows all from position ``first`` on, for the keys that ``layer`` has then."""
        for known_layer, known_first, known_mask, known in self._masks:
            if known_first == first and known_mask is mask and _are_alike(known_layer, layer):
                return known
        keys, kind = layer.key_positions_with(new), mask_format_of(self._adapter.text_config)
        adapted: torch.Tensor = decode_mask(mask, keys, layer.columns_with(new), first=first, mask_format=kind)
        self._masks.append((layer, first, mask, adapted))
        return adapted

    def _renumbered(
        self, key: tuple[int, ...], offset: torch.Tensor, hidden: torch.Tensor, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Position ids less ``offset`` (B, 1), and their rotary tables."""
        for known_key, known in self._places:
            if known_key == key:
                return known
        ids = kwargs["position_ids"] - offset
        tables = in_form_of(kwargs["position_embeddings"], *self._adapter.rope_tables(hidden, ids))
        places = {"position_ids": ids, "position_embeddings": tables}
        self._places.append((key, places))
        return places


def _are_alike(one: RoutedLayer, other: RoutedLayer) -> bool:
    """Whether they hold the same rows. Static layers of one stage may have different room, from prompts before."""
    if one.rows.stage_key != other.rows.stage_key or one.unlisted_room != other.unlisted_room:
        return False
    mine, its = one.rows.key_positions, other.rows.key_positions
    return mine is its or mine.shape[1] == its.shape[1]  # compiled code is compiled anew for sizes that are compared
