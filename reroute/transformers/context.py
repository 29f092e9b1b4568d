"""The kinds of forward: a routed prefill, one that runs dense, and new tokens on a routed cache.

A forward is one call of the base model, from the moment its ids are known. It is found by that call alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache

from ..config import Settings
from ..core.decision import Decision
from ..core.plan import Plan
from ..core.prefill import Decided, PositionTables, Prefill
from ..core.workspace import Workspace
from ..errors import RerouteError
from .adapters import ModelAdapter
from .attention import MaskFormat, decode_mask, mask_format_of, prefill_mask
from .cache import (
    GuardedLayer,
    RoutedLayer,
    RowPositions,
    cache_of,
    guard,
    guarded_layer,
    past_length,
    route_layer,
    stored_rows,
    tear,
)
from .vision import Recording

__all__ = ["DensePrefill", "ForwardContext", "PrefillFactory", "RoutedDecode", "RoutedPrefill"]

Kwargs = dict[str, Any]


class PrefillFactory(Protocol):
    """Makes the prefill once the model's RoPE tables are known, at the first layer whose input is looked at."""

    def __call__(
        self,
        plan: Plan,
        settings: Settings,
        hidden: torch.Tensor,
        tables: PositionTables,
        workspace: Workspace | None = None,
    ) -> Prefill:
        """``hidden`` (B, L, C) tells width and dtype, ``tables`` the device."""


class ForwardContext:
    """One forward of the base model, seen from its decoder and its layers.

    ``recording``: what its rankers read of the vision tower, until the last of them has decided.
    """

    recording: Recording | None = None

    def __init__(self, adapter: ModelAdapter, shape: tuple[int, int]) -> None:
        """``shape`` (B, L): tokens of the call. ``keep`` names the cache that its caller has, if it has one."""
        self._adapter, self._shape = adapter, shape
        self._is_claimed = self._is_running = False
        self._writable: GuardedLayer | None = None
        self._kept: tuple[Cache, int] | None = None

    @cached_property
    def _mask_format(self) -> MaskFormat:
        """Of the present attention, which the planner has checked; a dense prefill may have any."""
        return mask_format_of(self._adapter.text_config)

    def keep(self, cache: Cache | None) -> None:
        """The caller has ``cache``, whatever becomes of the call."""
        self._kept = None if cache is None else (cache, past_length(cache))

    def is_of(self, adapter: ModelAdapter) -> bool:
        """Whether it is one of the model of ``adapter``."""
        return self._adapter is adapter

    def claim(self, decoder: Any, args: tuple[Any, ...], kwargs: Kwargs) -> bool:
        """Whether this call of ``decoder`` is the one that the base model makes.

        Other calls may come before it and inside of it: of the decoder alone, or of another model.

        Raises:
            RerouteError: it might be, but so might one before that has ended.
        """
        embeds = None if args or kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        may_be_own = decoder is self._adapter.text and embeds is not None and embeds.shape[:2] == self._shape
        if not may_be_own or self._is_running:
            return False
        if self._is_claimed:
            raise RerouteError(
                "The decoder was called twice in one forward of its base model, with embeddings of one shape, and it "
                "is not known which call is the forward's. Call it before or after the forward, or give it input_ids."
            )
        self._is_claimed = self._is_running = True
        return True

    def before_layer(self, index: int, hidden: torch.Tensor, kwargs: Kwargs) -> torch.Tensor:
        """The input (B, S, C) of layer ``index`` instead of ``hidden``; its keyword arguments are changed in place."""
        return hidden

    def after_layer(self, index: int, output: torch.Tensor) -> torch.Tensor:
        """What the decoder gets instead of ``output`` (B, S, C) of layer ``index``."""
        return output

    def after_decoder(self, output: Any) -> Any:
        """What the base model gets instead of the decoder's ``output``."""
        self._is_running = False
        return output

    def finish(self) -> None:
        """The call has succeeded."""
        self._kept = None

    def abandon(self) -> None:
        """The call has failed."""
        if self._kept is not None:
            tear(*self._kept)

    def close(self) -> None:
        """The call has ended, in whatever way. Idempotent."""
        if self._writable is not None:
            self._writable.forbid_update()  # it failed before its layer stored anything

    def _allow_update(self, cache: Cache | None, index: int) -> RoutedLayer | None:
        """Let layer ``index`` store the tokens of this forward; returns the layer if it lacks rows of earlier ones."""
        self._writable = layer = guarded_layer(cache, index)
        if layer is not None:
            layer.allow_update()
        return layer if isinstance(layer, RoutedLayer) else None


@dataclass(frozen=True)
class _Stage:
    """What layers of one stage get, if they hold the same earlier rows, and which rows they hold afterwards.

    ``stored``: rows that the cache has then, of which ``rows`` need not list the last ones.
    """

    kwargs: Kwargs
    stored: int
    rows: RowPositions


class RoutedPrefill(ForwardContext):
    """A prefill whose layers from the first decision on run compact."""

    def __init__(
        self,
        plan: Plan,
        settings: Settings,
        adapter: ModelAdapter,
        start: PrefillFactory,
        workspace: Workspace | None = None,
        *,
        recording: Recording | None = None,
        record_states: bool = False,
    ) -> None:
        """No row is held until the first decision or look. ``record_states``: keep logical states for the caller."""
        super().__init__(adapter, (plan.batch, plan.length))
        self.plan, self.settings, self.recording = plan, settings, recording
        self.prefill: Prefill | None = None
        self.cache: Cache | None = None
        self._states: dict[int, torch.Tensor] = {}
        self._start, self._workspace, self._record = start, workspace, record_states
        self._deciding = {decision.score_layer: decision for decision in plan.decisions}
        self._pending: Decided | None = None
        self._stages: dict[tuple[int, ...], _Stage] = {}
        self._running: _Stage | None = None
        self._is_restored = False
        self._earlier_turns = RoutedDecode(adapter, self._shape)

    def before_layer(self, index: int, hidden: torch.Tensor, kwargs: Kwargs) -> torch.Tensor:
        """Decide and enter stages; give the layer the tables and the mask of the rows that run."""
        if self._record:
            self._states[index] = self._logical(hidden)
        hidden = self._enter(index, hidden)  # a stage that was decided a layer earlier
        decision, looks = self._deciding.get(index), index in self.plan.schedule.looks
        if self.prefill is None and (looks or decision is not None):
            self.prefill = self._begin(hidden, kwargs)
        if self.prefill is not None and looks:
            self.prefill.look(index, hidden)
        if self.prefill is not None and decision is not None:
            vision = self.recording.on(self.prefill.tables.cos.device) if self.recording is not None else None
            self._pending = self.prefill.decide(decision, hidden, vision)
            hidden = self._enter(index, hidden)
            self._forget_pictures(decision)
        if self.prefill is None or self.prefill.stage < 0:
            return self._earlier_turns.before_layer(index, hidden, kwargs)
        kwargs.update(self._stage(self.prefill, index, hidden, kwargs).kwargs)
        return hidden

    def after_layer(self, index: int, output: torch.Tensor) -> torch.Tensor:
        """Mark what the layer stored; after the last one, the states at logical length again."""
        stage, self._running = self._running, None
        # Nothing is stored while gradient checkpointing recomputes layers.
        if stage is not None and self.cache is not None and stored_rows(self.cache, index) == stage.stored:
            route_layer(self.cache, index, stage.rows)
        if index < len(self._adapter.layers) - 1:
            return output
        self._is_restored = True
        return self._logical(output)

    def after_decoder(self, output: Any) -> Any:
        """Hidden states at logical length, if they are asked for."""
        output = super().after_decoder(output)
        if output.get("hidden_states") is not None:
            states = enumerate(output.hidden_states)
            output.hidden_states = tuple(None if h is None else self._states.get(i, h) for i, h in states)
        return output

    def finish(self) -> None:
        """Let the other layers of the cache refuse what the routed ones must.

        Raises:
            RerouteError: layers were left out, or ran without routing.
        """
        if not self._is_restored or self.prefill is None or self.prefill.stage < len(self.plan.decisions) - 1:
            raise RerouteError(
                "Not all of the decoder's layers ran as routing needs it: other code runs them, or leaves some out. "
                "Call reroute.enable again on the model as it is now; with layers that are left out at random, "
                "disable routing."
            )
        if self.cache is not None:
            guard(self.cache, self.plan.past + self.plan.length - self.plan.tail)
        super().finish()

    def close(self) -> None:
        """Free what the prefill holds. Idempotent."""
        super().close()
        self._earlier_turns.close()
        self.recording = None
        if self.prefill is not None:
            self.prefill.close()

    def _logical(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if self.prefill is None or self.prefill.stage < 0 else self.prefill.restore(hidden)

    def _enter(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """The input of layer ``index``: of a new stage, if one was decided that begins there."""
        if self.prefill is None or self._pending is None or self._pending.decision.layer != index:
            return hidden
        decided, self._pending = self._pending, None
        self._stages.clear()
        return self.prefill.advance(decided, hidden)

    def _forget_pictures(self, decision: Decision) -> None:
        """Let go of what is kept of them if no ranker after ``decision`` looks, and nothing waits to be merged."""
        later = self.plan.decisions[decision.stage + 1 :]
        if self.recording is None or self._pending is not None or any(d.ranker.needs_vision for d in later):
            return
        if self.cache is not None:  # else generate comes with the same features again
            self.recording.release()
        self.recording = None

    def _begin(self, hidden: torch.Tensor, kwargs: Kwargs) -> Prefill:
        self.cache = cache_of(kwargs)
        cos, sin = kwargs["position_embeddings"]
        ids = kwargs.get("position_ids")
        # Of the three of M-RoPE layers use what the tables are made of, and nothing else.
        tables = PositionTables(cos, sin, ids if ids is None or ids.ndim == 2 else None)
        return self._start(self.plan, self.settings, hidden, tables, self._workspace)

    def _stage(self, prefill: Prefill, index: int, hidden: torch.Tensor, kwargs: Kwargs) -> _Stage:
        layer = self._allow_update(self.cache, index)
        earlier = () if layer is None else layer.rows.stage_key
        if earlier not in self._stages:
            self._stages[earlier] = self._make_stage(prefill, layer, hidden, kwargs)
        self._running = self._stages[earlier]
        return self._running

    def _make_stage(self, prefill: Prefill, layer: RoutedLayer | None, hidden: torch.Tensor, kwargs: Kwargs) -> _Stage:
        plan, rows = self.plan, prefill.positions
        key_positions = torch.where(rows < 0, -1, rows + plan.past) if plan.past else rows
        has_fillers = prefill.has_fillers
        if layer is not None:
            key_positions = torch.cat([layer.key_positions_with(0), key_positions], 1)
            has_fillers = has_fillers or layer.rows.has_fillers
        elif plan.past:
            past = torch.arange(plan.past, device=rows.device).expand(plan.batch, -1)
            key_positions = torch.cat([past, key_positions], 1)
        mask = prefill_mask(
            kwargs.get("attention_mask"),
            rows,
            key_positions,
            past=plan.past,
            has_fillers=has_fillers,
            is_causal=self._adapter.is_causal,
            mask_format=self._mask_format,
            dtype=hidden.dtype,
        )
        adapted = {
            "attention_mask": mask,
            "position_embeddings": (prefill.tables.cos, prefill.tables.sin),
            # Flash attention would take gaps in the ids for borders between packed sequences.
            "position_ids": None if self._mask_format == "padding" else prefill.tables.ids,
        }
        stage_key = (*(() if layer is None else layer.rows.stage_key), plan.decisions[prefill.stage].layer)
        rows_then = self._rows(key_positions, has_fillers, prefill.position_offset, stage_key)
        return _Stage(adapted, key_positions.shape[1], rows_then)

    def _rows(
        self, positions: torch.Tensor, has_fillers: bool, offset: torch.Tensor | None, stage_key: tuple[int, ...]
    ) -> RowPositions:
        """What is stored at ``positions`` (B, T); text after the visual tokens may be cropped later."""
        plan, end = self.plan, self.plan.past + self.plan.length
        floor = end - plan.tail
        if not plan.tail_has_padding:  # the rows of the tail then need no list: they follow one by one
            positions, end = positions[:, : positions.shape[1] - plan.tail], floor
        return RowPositions(positions, end, floor, has_fillers, offset, stage_key)


class RoutedDecode(ForwardContext):
    """New tokens on a cache with routed layers: decoding, or a later turn without pictures.

    Stages share the mask that their first layer needed.
    """

    def __init__(self, adapter: ModelAdapter, shape: tuple[int, int]) -> None:
        """See ``ForwardContext``."""
        super().__init__(adapter, shape)
        self._masks: dict[tuple[int, ...], torch.Tensor] = {}

    def before_layer(self, index: int, hidden: torch.Tensor, kwargs: Kwargs) -> torch.Tensor:
        """Give a routed layer the columns of the mask that it holds; nothing where there is no mask."""
        cache = cache_of(kwargs)
        layer = self._allow_update(cache, index)
        if layer is None:
            return hidden
        mask = kwargs.get("attention_mask")
        if mask is not None or layer.rows.has_fillers:
            kwargs["attention_mask"] = self._mask(layer, mask, hidden.shape[1])
        if layer.rows.position_offset is not None:
            kwargs["position_ids"] = ids = kwargs["position_ids"] - layer.rows.position_offset
            kwargs["position_embeddings"] = self._adapter.rope_tables(hidden, ids)
        return hidden

    def _mask(self, layer: RoutedLayer, mask: torch.Tensor | None, new: int) -> torch.Tensor:
        if layer.rows.stage_key not in self._masks:
            key_positions = layer.key_positions_with(new)
            self._masks[layer.rows.stage_key] = decode_mask(mask, key_positions, mask_format=self._mask_format)
        return self._masks[layer.rows.stage_key]


class DensePrefill(RoutedDecode):
    """A prefill whose plan changes nothing: the model runs as it would without it, so that its cost can be recorded."""

    prefill = None

    def __init__(self, plan: Plan, settings: Settings, adapter: ModelAdapter) -> None:
        """The cache is known from the first layer on: the model may have made it itself."""
        super().__init__(adapter, (plan.batch, plan.length))
        self.plan, self.settings = plan, settings
        self.cache: Cache | None = None

    def before_layer(self, index: int, hidden: torch.Tensor, kwargs: Kwargs) -> torch.Tensor:
        """See ``RoutedDecode``: earlier turns may have left routed layers."""
        self.cache = cache_of(kwargs)
        return super().before_layer(index, hidden, kwargs)
