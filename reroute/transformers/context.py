"""The kinds of forward: a routed prefill, one that runs dense, and new tokens on a routed cache."""

from __future__ import annotations

from dataclasses import dataclass
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
from .attention import decode_mask, prefill_mask
from .cache import (
    KeptStates,
    RoutedLayer,
    RowPositions,
    cache_of,
    cut,
    guard,
    is_routed,
    keep_states,
    route_layer,
    stored_rows,
)
from .forward import ForwardContext, Kwargs
from .vision import Recording

__all__ = ["DensePrefill", "PrefillFactory", "RoutedDecode", "RoutedPrefill"]


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
        kept: KeptStates | None = None,
        recording: Recording | None = None,
        record_states: bool = False,
    ) -> None:
        """No row is held until the first decision or look.

        ``kept``: states of earlier turns, which ``plan`` may reopen. ``record_states``: keep logical states for the
        caller.
        """
        super().__init__(adapter, plan.shape)
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
        self._kept_states = kept if plan.reopened else None
        self._earlier_turns = RoutedDecode(adapter, self._shape)

    def before_layer(self, index: int, hidden: torch.Tensor, kwargs: Kwargs) -> torch.Tensor:
        """Decide and enter stages; give the layer the tables and the mask of the rows that run."""
        if self._record:
            self._states[index] = self._logical(hidden)
        hidden = self._enter(index, hidden)  # a stage that was decided a layer earlier
        decision, looks = self._deciding.get(index), index in self.plan.schedule.looks
        if self.prefill is None and (looks or decision is not None):
            hidden = self._begin(index, hidden, kwargs)
        if self.prefill is not None and looks:
            self.prefill.look(index, hidden)
        if self.prefill is not None and decision is not None:
            vision = self.recording.on(self.prefill.tables.cos.device) if self.recording is not None else None
            self._pending = self.prefill.decide(decision, hidden, vision)
            hidden = self._enter(index, hidden)
            self._forget_pictures(decision)
        if self.prefill is None or (self.prefill.stage < 0 and not self.plan.reopened):
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
            keep_states(self.cache, self._kept_states)
        super().finish()

    def close(self) -> None:
        """Free what the prefill holds. Idempotent."""
        super().close()
        self._earlier_turns.close()
        self.recording = None
        if self.prefill is not None:
            self.prefill.close()

    def _logical(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.prefill is None:
            return hidden
        states = hidden if self.prefill.stage < 0 else self.prefill.restore(hidden)
        return states[:, self.plan.reopened :] if self.plan.reopened else states

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

    def _begin(self, index: int, hidden: torch.Tensor, kwargs: Kwargs) -> torch.Tensor:
        """Make the prefill; the input of layer ``index`` with the tokens that it reopens."""
        self.cache, plan, tables = cache_of(kwargs), self.plan, _tables(kwargs)
        earlier = self._kept_states
        if earlier is not None:
            together = earlier.followed_by(hidden, tables)
            hidden, tables = together.hidden, together.tables
        self.prefill = prefill = self._start(plan, self.settings, hidden, tables, self._workspace)
        # Of a cache that was routed before and does not choose again now, what was left out is not known.
        begins = self.settings.config.reopens and self.cache is not None and not is_routed(self.cache)
        if earlier is not None or begins:
            self._kept_states = KeptStates.of(index, plan.past, hidden, tables, prefill.is_visual)
        if self.cache is not None and plan.reopened:
            cut(self.cache, index, plan.past)
        return hidden

    def _stage(self, prefill: Prefill, index: int, hidden: torch.Tensor, kwargs: Kwargs) -> _Stage:
        layer = self._allow_update(self.cache, index)
        earlier = () if layer is None else layer.rows.stage_key
        if earlier not in self._stages:
            self._stages[earlier] = self._make_stage(prefill, layer, hidden, kwargs)
        stage = self._stages[earlier]
        self._running = None if prefill.stage < 0 else stage  # before the first decision its layer has all rows
        return stage

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
            None if plan.reopened else kwargs.get("attention_mask"),  # that is of the new tokens alone
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

    def __init__(self, adapter: ModelAdapter, shape: tuple[int, int], kept: KeptStates | None = None) -> None:
        """``kept``: what the cache keeps for later turns, and shall keep of the new tokens too."""
        super().__init__(adapter, shape)
        self._masks: dict[tuple[int, ...], torch.Tensor] = {}
        self._kept_states = kept
        self._cache: Cache | None = None

    def before_layer(self, index: int, hidden: torch.Tensor, kwargs: Kwargs) -> torch.Tensor:
        """Give a routed layer the columns of the mask that it holds; nothing where there is no mask."""
        self._cache = cache = cache_of(kwargs)
        if self._kept_states is not None and index == self._kept_states.layer:
            self._kept_states = self._kept_states.followed_by(hidden, _tables(kwargs))
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

    def finish(self) -> None:
        """See ``ForwardContext``."""
        if self._kept_states is not None and self._cache is not None:
            keep_states(self._cache, self._kept_states)
        super().finish()

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
        super().__init__(adapter, plan.shape)
        self.plan, self.settings = plan, settings
        self.cache: Cache | None = None

    def before_layer(self, index: int, hidden: torch.Tensor, kwargs: Kwargs) -> torch.Tensor:
        """See ``RoutedDecode``: earlier turns may have left routed layers."""
        self.cache = cache_of(kwargs)
        return super().before_layer(index, hidden, kwargs)


def _tables(kwargs: Kwargs) -> PositionTables:
    cos, sin = kwargs["position_embeddings"]
    ids = kwargs.get("position_ids")
    # Of the three of M-RoPE layers use what the tables are made of, and nothing else.
    return PositionTables(cos, sin, ids if ids is None or ids.ndim == 2 else None)
