"""Forwards of a decoder in a graph: its layers get what is the same for all prompts of a class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...core.prefill import Prefill
from ..adapters import ModelAdapter
from ..context import RoutedPrefill
from ..forward import ForwardContext, Kwargs
from .added import AddedStates
from .states import FillersFirst

__all__ = ["DenseInGraph", "InGraph", "RoutedInGraph"]


class InGraph:
    """What all layers of a graph need, whether they are routed or not."""

    def __init__(
        self, adapter: ModelAdapter, added: AddedStates, masked: frozenset[int], is_real: torch.Tensor
    ) -> None:
        """``is_real`` (B, L): True of tokens. See ``CapturedPrefill`` for the others."""
        self._adapter, self._added, self._masked, self._is_real = adapter, added, masked, is_real
        self._turned: dict[int, FillersFirst] = {}

    def enter(self, index: int, hidden: torch.Tensor, kwargs: Kwargs) -> torch.Tensor:
        """The input of layer ``index``, whose logical ``hidden`` states the decoder has.

        What is not needed for causal attention in order is dropped, and what attention functions look at on the host:
        a mask says nothing here (``NO_MASK``), and position ids show flash attention packed sequences.
        """
        kwargs["position_ids"] = None
        if index not in self._masked:
            kwargs["attention_mask"] = None
        return self._added.add(index, hidden)

    def turn(self, index: int, hidden: torch.Tensor, kwargs: Kwargs, prefill: Prefill | None = None) -> torch.Tensor:
        """The rows (B, S, C) of ``hidden`` as layer ``index`` needs them, in the stage of ``prefill`` if it runs."""
        if not self._adapter.is_recurrent(index):
            return hidden
        rows = self._rows(prefill)
        kwargs["attention_mask"] = rows.mask
        return rows.turned(hidden)

    def turn_back(self, index: int, output: torch.Tensor, prefill: Prefill | None = None) -> torch.Tensor:
        """What the decoder gets of the ``output`` of layer ``index``."""
        return self._rows(prefill).restored(output) if self._adapter.is_recurrent(index) else output

    def _rows(self, prefill: Prefill | None) -> FillersFirst:
        stage = -1 if prefill is None else prefill.stage
        if stage not in self._turned:
            is_real = self._is_real if prefill is None or stage < 0 else prefill.positions >= 0
            self._turned[stage] = FillersFirst(is_real)
        return self._turned[stage]


class RoutedInGraph(RoutedPrefill):
    """A routed prefill in which rows that are fillers come last. ``columns``: positions (B, S) of each stage."""

    def __init__(self, *args: Any, layers: InGraph, **kwargs: Any) -> None:
        """See ``RoutedPrefill``."""
        super().__init__(*args, **kwargs)
        self._layers = layers
        self.columns: list[torch.Tensor] = []

    def before_layer(self, index: int, hidden: torch.Tensor, kwargs: Kwargs) -> torch.Tensor:
        """See ``RoutedPrefill``."""
        hidden = super().before_layer(index, self._layers.enter(index, hidden, kwargs), kwargs)
        if self.prefill is not None and self.prefill.stage == len(self.columns):
            self.columns.append(self.prefill.positions)
        return self._layers.turn(index, hidden, kwargs, self.prefill)

    def after_layer(self, index: int, output: torch.Tensor) -> torch.Tensor:
        """See ``RoutedPrefill``."""
        return super().after_layer(index, self._layers.turn_back(index, output, self.prefill))

    def _given_rows(self, prefill: Prefill) -> torch.Tensor:
        """See ``RoutedPrefill``: there is no padding."""
        return prefill.sample_rows

    def _has_fillers(self, prefill: Prefill, mask: Any) -> bool:
        """See ``RoutedPrefill``: without a mask no row sees one."""
        return mask is not None


class DenseInGraph(ForwardContext):
    """A prefill that keeps everything."""

    columns: Sequence[torch.Tensor] = ()

    def __init__(self, adapter: ModelAdapter, shape: tuple[int, int], layers: InGraph) -> None:
        """See ``ForwardContext``."""
        super().__init__(adapter, shape)
        self._layers = layers

    def before_layer(self, index: int, hidden: torch.Tensor, kwargs: Kwargs) -> torch.Tensor:
        """See ``ForwardContext``."""
        return self._layers.turn(index, self._layers.enter(index, hidden, kwargs), kwargs)

    def after_layer(self, index: int, output: torch.Tensor) -> torch.Tensor:
        """See ``ForwardContext``."""
        return super().after_layer(index, self._layers.turn_back(index, output))
