"""The kinds of forward that hooks follow: a routed prefill, one that runs dense, and new tokens on a routed cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache

from reroute_kernels import Selection

from ..core.decision import Decision
from ..core.plan import Plan
from ..core.prefill import PositionTables, Prefill
from ..core.workspace import Workspace
from ..errors import RerouteError
from .adapters import ModelAdapter
from .attention import decode_mask, mask_format_of, prefill_mask
from .cache import RoutedLayer, allow_update, cache_of, guard, route_layer, routed_layer, stored_length

__all__ = ["DensePrefill", "ForwardContext", "PrefillFactory", "RoutedDecode", "RoutedPrefill"]

Kwargs = dict[str, Any]


class ForwardContext(Protocol):
    """One forward of the decoder, seen from its layers."""

    def before_layer(self, index: int, hidden: torch.Tensor, kwargs: Kwargs) -> tuple[torch.Tensor, Kwargs] | None:
        """Replace the input of layer ``index``, or None to leave it."""

    def after_last_layer(self, hidden: torch.Tensor) -> torch.Tensor:
        """Replace the output of the last layer."""


class PrefillFactory(Protocol):
    """Makes the prefill once the model's RoPE tables are known, at the first routing layer."""

    def __call__(
        self, plan: Plan, hidden: torch.Tensor, tables: PositionTables, workspace: Workspace | None = None
    ) -> Prefill:
        """``hidden`` (B, L, C) tells width and dtype, ``tables`` the device."""


@dataclass(frozen=True)
class _Stage:
    """What the layers of one stage get and store: keyword arguments, and the logical position of every key."""

    kwargs: Kwargs
    key_positions: torch.Tensor
    has_fillers: bool
    position_offset: torch.Tensor | None


class RoutedPrefill:
    """A prefill whose layers from the first decision on run compact."""

    def __init__(
        self, plan: Plan, adapter: ModelAdapter, start: PrefillFactory, cache: Cache | None, *, record_states: bool
    ) -> None:
        """Nothing is held until the first decision. ``record_states``: keep logical states for the caller.

        Raises:
            RerouteError: the present attention implementation cannot be routed.
        """
        self.plan = plan
        self.prefill: Prefill | None = None
        self.cache = cache
        self.states: dict[int, torch.Tensor] = {}
        self._adapter, self._start, self._record = adapter, start, record_states
        self._mask_format = mask_format_of(adapter.text_config)
        self._deciding = {decision.score_layer: decision for decision in plan.decisions}
        self._pending: tuple[Decision, Selection] | None = None
        self._stages: dict[tuple[int, ...], _Stage] = {}
        self._stored: dict[int, tuple[_Stage, tuple[int, ...]]] = {}
        self._earlier_turns = RoutedDecode(adapter)

    def close(self) -> None:
        """Free what the prefill holds. Idempotent."""
        if self.prefill is not None:
            self.prefill.close()

    def before_layer(self, index: int, hidden: torch.Tensor, kwargs: Kwargs) -> tuple[torch.Tensor, Kwargs] | None:
        """Decide and enter stages; give the layer the tables and the mask of the rows that run."""
        if self._record:
            self.states[index] = self.after_last_layer(hidden)
        hidden = self._enter(index, hidden)  # a stage that was decided a layer earlier
        if (decision := self._deciding.get(index)) is not None:
            if self.prefill is None:
                self.prefill = self._begin(hidden, kwargs)
            self._pending = decision, self.prefill.decide(decision, hidden)
            hidden = self._enter(index, hidden)
        if self.prefill is None or self.prefill.stage < 0:
            return self._earlier_turns.before_layer(index, hidden, kwargs)
        return hidden, {**kwargs, **self._stage(self.prefill, index, hidden, kwargs).kwargs}

    def after_last_layer(self, hidden: torch.Tensor) -> torch.Tensor:
        """The decoder's output at logical length again."""
        return hidden if self.prefill is None or self.prefill.stage < 0 else self.prefill.restore(hidden)

    def finish(self) -> None:
        """Tell the cache which rows its layers hold; text after the visual tokens may be cropped later.

        Raises:
            RerouteError: no decision was made, as the decoder ran without its hooks.
        """
        if self.prefill is None:
            raise RerouteError(
                "The decoder's layers ran without their hooks, so nothing was routed: they were replaced after "
                "reroute.enable, or other code runs them. Call reroute.enable again on the model as it is now."
            )
        if self.cache is None:
            return
        tail = self.plan.tail
        logical = self.plan.past + self.plan.length - tail
        for index, (stage, stage_key) in self._stored.items():
            if stored_length(self.cache, index) != stage.key_positions.shape[1]:
                continue  # gradient checkpointing runs layers without the cache
            key_positions = stage.key_positions[:, : stage.key_positions.shape[1] - tail]
            route_layer(self.cache, index, key_positions, logical, stage.has_fillers, stage.position_offset, stage_key)
        guard(self.cache, logical)

    def _enter(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """The input of layer ``index``: of a new stage, if one was decided that begins there."""
        if self.prefill is None or self._pending is None or self._pending[0].layer != index:
            return hidden
        decision, selection = self._pending
        self._pending = None
        self._stages.clear()
        return self.prefill.advance(decision, selection, hidden)

    def _begin(self, hidden: torch.Tensor, kwargs: Kwargs) -> Prefill:
        self.cache = cache_of(kwargs)
        cos, sin = kwargs["position_embeddings"]
        return self._start(self.plan, hidden, PositionTables(cos, sin, kwargs.get("position_ids")))

    def _stage(self, prefill: Prefill, index: int, hidden: torch.Tensor, kwargs: Kwargs) -> _Stage:
        """Arguments of layer ``index``: the same for all layers of a stage that hold the same earlier rows."""
        allow_update(self.cache, index)
        layer = routed_layer(self.cache, index)
        earlier = () if layer is None else layer.stage_key
        if earlier not in self._stages:
            self._stages[earlier] = self._make_stage(prefill, layer, hidden, kwargs)
        stage = self._stages[earlier]
        self._stored[index] = stage, (*earlier, self.plan.decisions[prefill.stage].layer)
        return stage

    def _make_stage(self, prefill: Prefill, layer: RoutedLayer | None, hidden: torch.Tensor, kwargs: Kwargs) -> _Stage:
        plan, rows = self.plan, prefill.positions
        key_positions = torch.where(rows < 0, -1, rows + plan.past) if plan.past else rows
        has_fillers = prefill.has_fillers
        if layer is not None:
            key_positions = torch.cat([layer.key_positions_with(0), key_positions], 1)
            has_fillers = has_fillers or layer.has_fillers
        elif plan.past:
            past = torch.arange(plan.past, device=rows.device).expand(plan.batch, -1)
            key_positions = torch.cat([past, key_positions], 1)
        mask = prefill_mask(
            kwargs.get("attention_mask"),
            rows,
            key_positions,
            past=plan.past,
            has_fillers=has_fillers,
            mask_format=self._mask_format,
            dtype=hidden.dtype,
        )
        adapted = {
            "attention_mask": mask,
            "position_embeddings": (prefill.tables.cos, prefill.tables.sin),
            # Flash attention would take gaps in the ids for borders between packed sequences.
            "position_ids": None if self._mask_format == "padding" else prefill.tables.ids,
        }
        return _Stage(adapted, key_positions, has_fillers, prefill.position_offset)


class RoutedDecode:
    """New tokens on a cache with routed layers: decoding, or a later turn without pictures."""

    def __init__(self, adapter: ModelAdapter) -> None:
        """For one forward; stages share the mask that their first layer needed.

        Raises:
            RerouteError: the present attention implementation cannot be routed.
        """
        self._adapter, self._mask_format = adapter, mask_format_of(adapter.text_config)
        self._masks: dict[tuple[int, ...], torch.Tensor] = {}

    def before_layer(self, index: int, hidden: torch.Tensor, kwargs: Kwargs) -> tuple[torch.Tensor, Kwargs] | None:
        """Give a routed layer the columns of the mask that it holds; nothing where there is no mask."""
        cache = cache_of(kwargs)
        allow_update(cache, index)
        layer = routed_layer(cache, index)
        if layer is None:
            return None
        mask = kwargs.get("attention_mask")
        changed: Kwargs = {}
        if mask is not None or layer.has_fillers:
            changed["attention_mask"] = self._mask(layer, mask, hidden.shape[1])
        if layer.position_offset is not None:
            changed |= self._shifted(layer.position_offset, hidden, kwargs)
        return (hidden, {**kwargs, **changed}) if changed else None

    def after_last_layer(self, hidden: torch.Tensor) -> torch.Tensor:
        """Nothing to do: new tokens run in every layer."""
        return hidden

    def _mask(self, layer: RoutedLayer, mask: torch.Tensor | None, new: int) -> torch.Tensor:
        if layer.stage_key not in self._masks:
            key_positions = layer.key_positions_with(new)
            self._masks[layer.stage_key] = decode_mask(mask, key_positions, mask_format=self._mask_format)
        return self._masks[layer.stage_key]

    def _shifted(self, position_offset: torch.Tensor, hidden: torch.Tensor, kwargs: Kwargs) -> Kwargs:
        ids = kwargs["position_ids"] - position_offset
        return {"position_embeddings": self._adapter.rope_tables(hidden, ids), "position_ids": ids}


class DensePrefill(RoutedDecode):
    """A prefill whose plan changes nothing: the model runs as it would without it, so that its cost can be recorded."""

    prefill = None

    def __init__(self, plan: Plan, adapter: ModelAdapter) -> None:
        """The cache is known from the first layer on: the model may have made it itself."""
        super().__init__(adapter)
        self.plan = plan
        self.cache: Cache | None = None

    def before_layer(self, index: int, hidden: torch.Tensor, kwargs: Kwargs) -> tuple[torch.Tensor, Kwargs] | None:
        """See ``RoutedDecode``: earlier turns may have left routed layers."""
        self.cache = cache_of(kwargs)
        return super().before_layer(index, hidden, kwargs)
