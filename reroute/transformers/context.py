"""The kinds of prefill: a routed one, and one that runs dense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import torch
from transformers.cache_utils import Cache

from ..config import Settings
from ..core.decision import Decision
from ..core.home import Home
from ..core.plan import Plan
from ..core.prefill import Decided, PositionTables, Prefill, Tables
from ..core.workspace import Workspace
from ..errors import RerouteError
from ..rankers import Vision
from ..rankers.vision import UNSEEN
from .adapters import PER_TOKEN, ModelAdapter, identity, in_form_of, tables_in
from .attention import prefill_mask
from .cache import (
    KeptStates,
    Room,
    RowPositions,
    cache_of,
    cut,
    give_room,
    guard,
    has_stored,
    has_windows,
    is_routed,
    is_static,
    keep_states,
    keeps_whole_prompt,
    room_of,
    route_layer,
    visible_rows,
    with_room,
)
from .decoding import RoutedDecode, tables_of
from .forward import ForwardContext, Kwargs
from .stages import Held, Stage
from .vision import Recording

__all__ = ["DensePrefill", "HomeFactory", "RoutedPrefill"]


HomeFactory: TypeAlias = Callable[[Plan, torch.Tensor, PositionTables, Workspace | None], Home]
"""Makes the home of a prefill, at the first layer whose input (B, L, C) is looked at: that tells width and dtype, and
the model's rotary tables, which are known by then, the device.
"""


class RoutedPrefill(ForwardContext):
    """A prefill whose layers from the first decision on run compact."""

    def __init__(
        self,
        plan: Plan,
        settings: Settings,
        adapter: ModelAdapter,
        home: HomeFactory,
        workspace: Workspace | None = None,
        *,
        kept: KeptStates | None = None,
        recording: Recording | None = None,
        record_states: bool = False,
        trace: bool = False,
    ) -> None:
        """No row is held until the first decision or look.

        ``kept``: states of earlier turns, which ``plan`` may reopen. ``record_states``: keep logical states for the
        caller; ``trace``: and the decisions.
        """
        super().__init__(adapter, plan.shape)
        self.plan, self.settings, self.recording = plan, settings, recording
        self.prefill: Prefill | None = None
        self.cache: Cache | None = None
        self._states: dict[int, torch.Tensor] = {}
        self._home, self._workspace, self._record, self._trace = home, workspace, record_states, trace
        self._deciding = {decision.score_layer: decision for decision in plan.decisions}
        self._pending: Decided | None = None
        self._stages: dict[tuple[Any, ...], Stage] = {}
        self._begun_with: Any = None
        self._running: Stage | None = None
        self._usual_room: tuple[int, int] | None = None
        self._is_restored = self._ran_elsewhere = False
        self._kept_states = kept if plan.reopened else None
        self._earlier_turns = RoutedDecode(adapter, self._shape)

    def before_layer(self, index: int, hidden: torch.Tensor, kwargs: Kwargs) -> torch.Tensor:
        """Decide and enter stages; give the layer the tables and the mask of the rows that run."""
        if self._record:
            self._states[index] = self._logical(hidden)
        hidden = self._enter(index, hidden)  # a stage that was decided a layer earlier
        decision, looks = self._deciding.get(index), index in self.plan.schedule.looks
        if looks or decision is not None:
            self._adapter.unshard(index)
            hidden = hidden if self.prefill is not None else self._begin(index, hidden, kwargs)
        if self.prefill is not None and looks:
            self.prefill.look(index, hidden, self._own_tables(kwargs))
        if self.prefill is not None and decision is not None:
            self._pending = self.prefill.decide(
                decision, hidden, self._vision(decision, self.prefill), self._own_tables(kwargs)
            )
            hidden = self._enter(index, hidden)
            self._forget_pictures(decision)
        self._has_begun = True
        if self.prefill is None or (self.prefill.stage < 0 and not self.plan.reopened):
            return self._earlier_turns.adapt(index, hidden, kwargs)
        if self._adapter.attends(index):
            kwargs.update(self._stage(self.prefill, index, hidden, kwargs).kwargs)
        elif self._adapter.is_recurrent(index):
            kwargs.update(self._rows_in_order(self.prefill, index, kwargs))
        for name in PER_TOKEN:
            if kwargs.get(name) is not None:
                kwargs[name] = _at(self._given_rows(self.prefill), kwargs[name].unsqueeze(-1)).squeeze(-1)
        return hidden

    def after_layer(self, index: int, output: torch.Tensor) -> torch.Tensor:
        """Mark what the layer stored; after the last one, the states at logical length again."""
        self.forbid_update()
        self._earlier_turns.forbid_update()
        stage, self._running = self._running, None
        # Nothing is stored while gradient checkpointing recomputes layers.
        if stage is not None and self.cache is not None and has_stored(self.cache, index, stage.stored):
            route_layer(self.cache, index, stage.rows)
        self._give_usual_room()
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
        ends, length = [*self.plan.schedule.layers[1:], len(self._adapter.layers)], self._end
        for decision, its, end in zip(self.plan.decisions, positions, ends, strict=True):
            active, width = self.plan.active(decision.stage), self.plan.width(decision.stage)
            offset = None if offsets is None else offsets[decision.stage][:, None]
            by_room: dict[Room | None, RowPositions] = {}
            for index in (layer for layer in self._adapter.attending if decision.layer <= layer < end):
                room = room_of(cache, index, 0, 0, length)  # that it has by now
                if room not in by_room:
                    listed, given, beyond = with_room(its, length, room)
                    has_fillers = min(active) < width or (beyond and listed is given)
                    by_room[room] = self._rows(listed, its.shape[1], has_fillers, offset, (decision.layer,))
                route_layer(cache, index, by_room[room])

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
        self._give_usual_room()
        if self.prefill is not None:
            self.prefill.close()

    def _give_usual_room(self) -> None:
        if self._usual_room is not None and self.cache is not None:
            give_room(self.cache, *self._usual_room)
            self._usual_room = None

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

    def _vision(self, decision: Decision, prefill: Prefill) -> Vision:
        """The pictures, if the ranker of ``decision`` asked for them."""
        if self.recording is None or not decision.ranker.needs_vision:
            return UNSEEN
        return self.recording.on(prefill.tables.cos.device)

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
        self.cache, plan = cache_of(kwargs), self.plan
        self._begun_with = kwargs.get("position_embeddings")
        tables = tables_of(kwargs, hidden, self._adapter.head_dim)
        earlier = self._kept_states
        if earlier is not None:
            together = earlier.followed_by(hidden, tables)
            hidden, tables = together.hidden, together.tables
        home = self._home(plan, hidden, tables, self._workspace)
        self.prefill = prefill = Prefill(plan, home, self._adapter, tables, trace=self._trace)
        # Of a cache that was routed before and does not choose again now, what was left out is not known.
        begins = self.settings.config.reopens and self.cache is not None and not is_routed(self.cache)
        if earlier is not None or begins:
            self._kept_states = KeptStates.of(index, plan.past, hidden, tables, prefill.is_visual)
        if self.cache is not None and plan.reopened:
            cut(self.cache, index, plan.past)
        return hidden

    def _own_tables(self, kwargs: Kwargs) -> Tables | None:
        """Those that a layer gets, if they are others than those with which the prefill began."""
        given = kwargs.get("position_embeddings")
        is_own = self._adapter.has_several_tables and identity(given) != identity(self._begun_with)
        return tables_in(given) if is_own else None

    def _stage(self, prefill: Prefill, index: int, hidden: torch.Tensor, kwargs: Kwargs) -> Stage:
        layer, mask = self._allow_update(self.cache, index), kwargs.get("attention_mask")
        visible = visible_rows(self.cache, index, self.plan.past)
        new = prefill.positions.shape[1]
        room = room_of(self.cache, index, self.plan.length - new, new, self._end)
        earlier = () if layer is None else layer.rows.stage_key
        own = identity(kwargs.get("position_embeddings")) if self._adapter.has_several_tables else None
        key = (earlier, visible, room, id(mask), own)
        if key not in self._stages:
            held = Held(layer, visible, room)
            self._stages[key] = self._make_stage(prefill, held, kwargs, hidden.dtype)
        stage = self._stages[key]
        self._running = None if prefill.stage < 0 else stage  # before the first decision its layer has all rows
        if self._running is not None and self.cache is not None and room is not None:
            self._usual_room = index, give_room(self.cache, index, room.rows)
        return stage

    def _given_rows(self, prefill: Prefill) -> torch.Tensor:
        """Where each row that runs is (B, S) in what the decoder gives its layers for all rows, -1 for fillers."""
        return prefill.positions

    def _has_fillers(self, prefill: Prefill, mask: Any) -> bool:
        """Whether a layer that is given ``mask`` needs one on account of fillers."""
        return prefill.has_fillers

    def _rows_in_order(self, prefill: Prefill, index: int, kwargs: Kwargs) -> Kwargs:
        """What layer ``index`` gets, which keeps a state: which rows are there. Fillers come first, and change none."""
        self._allow_update(self.cache, index)
        mask = prefill.positions >= 0 if prefill.has_fillers else None
        return {"attention_mask": mask, **self._places_of_rows(prefill, kwargs)}

    def _make_stage(self, prefill: Prefill, held: Held, kwargs: Kwargs, dtype: torch.dtype) -> Stage:
        plan, rows = self.plan, self._given_rows(prefill)
        mask, tables = kwargs.get("attention_mask"), kwargs.get("position_embeddings")
        positions = torch.where(rows < 0, -1, rows + plan.past) if plan.past else rows
        if held.layer is not None:
            positions = torch.cat([held.layer.all_positions_until(plan.past), positions], 1)
        elif plan.past:
            past = torch.arange(plan.past, device=rows.device).expand(plan.batch, -1)
            positions = torch.cat([past, positions], 1)
        stored = positions.shape[1]
        visible = held.visible + rows.shape[1] if held.room is None else held.room.rows
        listed, positions, beyond = with_room(positions, self._end, held.room)
        has_fillers = self._has_fillers(prefill, mask) or (held.layer is not None and held.layer.rows.has_fillers)
        adapted = {
            "attention_mask": prefill_mask(
                None if plan.reopened else mask,  # that is of the new tokens alone
                rows,
                positions[:, positions.shape[1] - visible :],
                past=plan.past,
                has_fillers=has_fillers or beyond,
                is_causal=self._adapter.is_causal,
                mask_format=self._mask_format,
                dtype=dtype,
            ),
            **self._places_of_rows(prefill, kwargs),
        }
        earlier = () if held.layer is None else held.layer.rows.stage_key
        stage_key = (*earlier, plan.decisions[prefill.stage].layer)
        is_filled_up = has_fillers or (beyond and listed is positions)
        rows_then = self._rows(listed, stored, is_filled_up, prefill.position_offset, stage_key)
        return Stage((mask, tables), adapted, stored, rows_then)

    def _places_of_rows(self, prefill: Prefill, kwargs: Kwargs) -> Kwargs:
        """Tables and position ids of the rows that run, for a layer that gets logical ones, if it gets some."""
        running, tables = prefill.tables, kwargs.get("position_embeddings")
        # Flash attention would take gaps in the ids for borders between packed sequences.
        places: Kwargs = {"position_ids": None if self._mask_format == "padding" else running.ids}
        if tables is not None:
            own, at = self._own_tables(kwargs), self._given_rows(prefill)
            cos, sin = (running.cos, running.sin) if own is None else (_at(at, its) for its in own)
            places["position_embeddings"] = in_form_of(tables, cos, sin)
        return places

    @cached_property
    def _end(self) -> int:
        """The logical length of the cache once the prompt is stored."""
        return self.plan.past + self.plan.length

    @cached_property
    def _floor(self) -> int:
        """The logical length to which the cache, known by then, may be cropped: text after the visual tokens may go.

        Not if some of it is padding, in layers that keep a window: fillers would come behind rows, and drop out later
        than the rows that they stand for. Nor in static ones, whose rows have a place for good, nor where all that
        comes later has a window.
        """
        plan, cache = self.plan, self.cache
        keeps_places = cache is not None and (has_windows(cache) or is_static(cache))
        has_no_tail = (plan.tail_has_padding and keeps_places) or (cache is not None and keeps_whole_prompt(cache))
        return self._end - (0 if has_no_tail else plan.tail)

    def _rows(
        self,
        positions: torch.Tensor,
        stored: int,
        has_fillers: bool,
        offset: torch.Tensor | None,
        stage_key: tuple[int, ...],
    ) -> RowPositions:
        """What is stored at ``positions`` (B, T), or will be; text after the visual tokens may be cropped later."""
        plan, end = self.plan, self._end + positions.shape[1] - stored
        if is_static(self.cache):
            pass  # whose layers list all of their room, if rows stay where they are
        elif not plan.tail_has_padding:  # the rows of the tail then need no list: they follow one by one
            positions, end = positions[:, : stored - plan.tail], end - plan.tail
        return RowPositions(positions, end, self._floor, has_fillers, offset, stage_key)


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
        self.is_idle = not is_routed(self.cache)
        return hidden if self.is_idle else super().before_layer(index, hidden, kwargs)


def _at(positions: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The rows of a logical ``table`` (B or 1, L, w) at ``positions`` (B, S), any for fillers."""
    at = positions.clamp(min=0).unsqueeze(-1).to(table.device)
    return table.expand(len(at), -1, -1).gather(1, at.expand(-1, -1, table.shape[-1]))
