"""The kinds of forward: a routed prefill, one that runs dense, and new tokens on a routed cache."""

from __future__ import annotations

from collections.abc import Sequence
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
    has_windows,
    is_routed,
    keep_states,
    route_layer,
    stored_columns,
    visible_rows,
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
    """What layers of one stage get, if they hold the same earlier rows and the decoder gives them the same.

    - ``given``: what that is, mask and tables.
    - ``kwargs``: the same, adapted to the rows that run.
    - ``stored``: rows that the cache was given afterwards, of which ``rows`` need not list the last ones.
    """

    given: tuple[Any, Any]
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
        self._stages: dict[tuple[Any, ...], _Stage] = {}
        self._begun: PositionTables | None = None
        self._running: _Stage | None = None
        self._is_restored = self._ran_elsewhere = False
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
        if stage is not None and self.cache is not None and stored_columns(self.cache, index) == stage.stored:
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
        if not self._ran_elsewhere and not self._ran_whole:
            raise RerouteError(
                "Not all of the decoder's layers ran as routing needs it: other code runs them, or leaves some out. "
                "Call reroute.enable again on the model as it is now; with layers that are left out at random, "
                "disable routing."
            )
        if self.cache is not None:
            guard(self.cache, self._floor)
            keep_states(self.cache, self._kept_states)
        super().finish()

    def ran_elsewhere(
        self, cache: Cache | None, positions: Sequence[torch.Tensor], offsets: torch.Tensor | None
    ) -> None:
        """The layers have run in a graph. If there is a ``cache`` it holds what they stored, of each stage at
        ``positions`` (B, T).

        ``offsets`` (stages, B) of renumbered positions: see ``RowPositions``.
        """
        self._ran_elsewhere, self.cache = True, cache
        if cache is None:
            return
        ends = [*self.plan.schedule.layers[1:], len(self._adapter.layers)]
        for decision, its, end in zip(self.plan.decisions, positions, ends, strict=True):
            active, width = self.plan.active(decision.stage), self.plan.width(decision.stage)
            offset = None if offsets is None else offsets[decision.stage][:, None]
            rows = self._rows(its, min(active) < width, offset, (decision.layer,))
            for index in range(decision.layer, end):
                route_layer(cache, index, rows)

    @property
    def _ran_whole(self) -> bool:
        """Whether every layer ran, and every decision was made."""
        prefill = self.prefill
        return self._is_restored and prefill is not None and prefill.stage == len(self.plan.decisions) - 1

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
        self._begun = tables
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
        layer, mask, tables = self._allow_update(self.cache, index), kwargs.get("attention_mask"), _tables(kwargs)
        visible = visible_rows(self.cache, index)
        earlier = () if layer is None else layer.rows.stage_key
        key = (earlier, visible, id(mask), id(tables.cos) if self._adapter.has_several_tables else None)
        if key not in self._stages:
            self._stages[key] = self._make_stage(prefill, layer, visible, mask, tables, hidden.dtype)
        stage = self._stages[key]
        self._running = None if prefill.stage < 0 else stage  # before the first decision its layer has all rows
        return stage

    def _make_stage(
        self,
        prefill: Prefill,
        layer: RoutedLayer | None,
        visible: int,
        mask: torch.Tensor | None,
        tables: PositionTables,
        dtype: torch.dtype,
    ) -> _Stage:
        """For ``layer`` and others of its kind, which give the last ``visible`` of their earlier rows."""
        plan, rows = self.plan, prefill.positions
        positions = torch.where(rows < 0, -1, rows + plan.past) if plan.past else rows
        if layer is not None:
            positions = torch.cat([layer.all_positions_with(0), positions], 1)
        elif plan.past:
            past = torch.arange(plan.past, device=rows.device).expand(plan.batch, -1)
            positions = torch.cat([past, positions], 1)
        has_fillers = prefill.has_fillers or (layer is not None and layer.rows.has_fillers)
        adapted_tables = self._tables_of_rows(prefill, tables)
        adapted = {
            "attention_mask": prefill_mask(
                None if plan.reopened else mask,  # that is of the new tokens alone
                rows,
                positions[:, positions.shape[1] - visible - rows.shape[1] :],
                past=plan.past,
                has_fillers=has_fillers,
                is_causal=self._adapter.is_causal,
                mask_format=self._mask_format,
                dtype=dtype,
            ),
            "position_embeddings": (adapted_tables.cos, adapted_tables.sin),
            # Flash attention would take gaps in the ids for borders between packed sequences.
            "position_ids": None if self._mask_format == "padding" else adapted_tables.ids,
        }
        stage_key = (*(() if layer is None else layer.rows.stage_key), plan.decisions[prefill.stage].layer)
        rows_then = self._rows(positions, has_fillers, prefill.position_offset, stage_key)
        return _Stage((mask, tables), adapted, positions.shape[1], rows_then)

    def _tables_of_rows(self, prefill: Prefill, tables: PositionTables) -> PositionTables:
        """Of the rows that run, where a layer gets logical ``tables``: of its own if those of some layers differ."""
        if not self._adapter.has_several_tables or self._begun is None or tables.cos is self._begun.cos:
            return prefill.tables
        at = prefill.positions.clamp(min=0).unsqueeze(-1)
        cos, sin = (
            table.expand(len(at), -1, -1).gather(1, at.to(table.device).expand(-1, -1, table.shape[-1]))
            for table in (tables.cos, tables.sin)
        )
        return PositionTables(cos, sin, prefill.tables.ids)

    @property
    def _floor(self) -> int:
        """The logical length to which the cache may be cropped: text after the visual tokens may go.

        Not if some of it is padding, in layers that keep a window: fillers would come behind rows, and drop out later
        than the rows that they stand for.
        """
        plan = self.plan
        has_no_tail = plan.tail_has_padding and self.cache is not None and has_windows(self.cache)
        return plan.past + plan.length - (0 if has_no_tail else plan.tail)

    def _rows(
        self, positions: torch.Tensor, has_fillers: bool, offset: torch.Tensor | None, stage_key: tuple[int, ...]
    ) -> RowPositions:
        """What is stored at ``positions`` (B, T); text after the visual tokens may be cropped later."""
        plan, end = self.plan, self.plan.past + self.plan.length
        if not plan.tail_has_padding:  # the rows of the tail then need no list: they follow one by one
            positions, end = positions[:, : positions.shape[1] - plan.tail], end - plan.tail
        return RowPositions(positions, end, self._floor, has_fillers, offset, stage_key)


class RoutedDecode(ForwardContext):
    """New tokens on a cache with routed layers: decoding, or a later turn without pictures.

    Stages share the mask that their first layer needed.
    """

    def __init__(self, adapter: ModelAdapter, shape: tuple[int, int], kept: KeptStates | None = None) -> None:
        """``kept``: what the cache keeps for later turns, and shall keep of the new tokens too."""
        super().__init__(adapter, shape)
        self._masks: dict[tuple[Any, ...], tuple[torch.Tensor | None, torch.Tensor]] = {}
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
        mask, first = kwargs.get("attention_mask"), layer.first_visible
        if mask is not None or layer.rows.has_fillers or first:
            kwargs["attention_mask"] = self._mask(layer, mask, hidden.shape[1], first)
        if layer.rows.position_offset is not None:
            kwargs["position_ids"] = ids = kwargs["position_ids"] - layer.rows.position_offset
            kwargs["position_embeddings"] = self._adapter.rope_tables(hidden, ids)
        return hidden

    def finish(self) -> None:
        """See ``ForwardContext``."""
        if self._kept_states is not None and self._cache is not None:
            keep_states(self._cache, self._kept_states)
        super().finish()

    def _mask(self, layer: RoutedLayer, mask: torch.Tensor | None, new: int, first: int) -> torch.Tensor:
        """``mask``, or one that shows all from position ``first`` on, for the keys that ``layer`` has then."""
        key = (layer.rows.stage_key, first, id(mask))
        if key not in self._masks:
            keys, length = layer.key_positions_with(new), layer.get_seq_length() + new
            adapted = decode_mask(mask, keys, length, first=first, mask_format=self._mask_format)
            self._masks[key] = mask, adapted
        return self._masks[key][1]


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
