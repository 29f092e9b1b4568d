"""Prefills of one model that are replayed where they can be: who asks whether, captures, and hands over the results."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache

from reroute_kernels import Backend

from ...config import Settings
from ...core.cost import ModelShape
from ...core.plan import Plan
from ...core.schedule import Schedule
from ...graphs import RECORDERS, Alignment, Arena, Graphs, GraphStore, GraphUse, ShapeClass, needed_rows, waste
from ..adapters import FeatureForm, Features, ModelAdapter, added_before
from ..attention import mask_format_of
from ..cache import cache_of
from ..context import DensePrefill, RoutedPrefill
from ..forward import Kwargs
from .captured import CapturedPrefill, Given
from .decoder_state import DecoderState
from .eligible import why_not_call, why_not_model
from .masks import GivenMasks, masks_in
from .refused import CannotCapture, CaptureFails, LacksMemory, NotNow
from .stage_cache import EmptyCaches

__all__ = ["Replays"]

Decoder = Callable[..., Any]
"""The own call of a decoder, as if it were not routed, with keyword arguments."""


class Replays:
    """The graphs of the model of ``adapter``, for all of its calls from whatever thread."""

    def __init__(
        self, graphs: Graphs, adapter: ModelAdapter, shape: ModelShape, backend: Callable[[torch.device], Backend]
    ) -> None:
        """``backend``: what runs operations on a device. Nothing is captured yet."""
        self._adapter, self._backend = adapter, backend
        self._store: GraphStore[CapturedPrefill] = GraphStore(graphs, shape)
        self._arena: Arena | None = None
        self._state: DecoderState | None = None
        self._caches: EmptyCaches | None = None
        self._reaches: dict[int, int] | None = None
        self._refused: dict[Hashable, str] = {}
        self._added: dict[FeatureForm, tuple[int, ...] | None] = {}

    def run(self, forward: RoutedPrefill | DensePrefill, decoder: Decoder, kwargs: Kwargs, why: str = "") -> Any:
        """What ``decoder`` would return for ``kwargs``, from a replay; None if it has to be called.

        ``why`` it has to be, if that is known. In any case ``forward.graph`` says what came of it.
        """
        output, why = None, why or why_not_call(self._adapter, kwargs)
        if not why:
            embeds = kwargs["inputs_embeds"]
            arena = self._arena_on(embeds.device)
            if arena is None:
                why = _nowhere(embeds.device)
            else:
                # What is made in inference mode could not be written in a later replay outside of it.
                with arena.turn(), torch.inference_mode(False), torch.no_grad():
                    output, why = self._in_turn(arena, forward, decoder, kwargs)
        if output is None:
            forward.graph = partial(GraphUse, why, None, *self.held)
        return output

    @property
    def held(self) -> tuple[int, int]:
        """How many graphs there are, and what those of their device hold in bytes."""
        return len(self._store), 0 if self._arena is None else self._arena.nbytes

    def capture(
        self, settings: Settings, decoder: Decoder, plan: Plan, embeds: torch.Tensor, positions: torch.Tensor
    ) -> str:
        """Have a graph for ``plan``; why there is none, if so. ``embeds`` and ``positions`` are of any such prompts."""
        given = Given(embeds, positions, self._no_features(plan, embeds))
        arena = self._arena_on(given.embeds.device)
        if arena is None:
            return _nowhere(given.embeds.device)
        with arena.turn(), torch.inference_mode(False), torch.no_grad():
            backend = self._backend(given.embeds.device)
            why = self._why_not_model(settings, backend)
            if not why:
                found = self._found(arena, settings, backend, decoder, plan, given, at_once=True)
                why = found if isinstance(found, str) else ""
            return why

    def _arena_on(self, device: torch.device) -> Arena | None:
        if device.type not in RECORDERS:
            return None
        if self._arena is None or self._arena.device != device:
            self._arena = Arena.shared(device)
            self._arena.stores.add(self._store)
        return self._arena

    def _in_turn(
        self, arena: Arena, forward: RoutedPrefill | DensePrefill, decoder: Decoder, kwargs: Kwargs
    ) -> tuple[Any, str]:
        settings, plan, embeds = forward.settings, forward.plan, kwargs["inputs_embeds"]
        backend = self._backend(embeds.device)
        positions = _rotary(kwargs.get("position_ids"), self._adapter.position_axes)
        given = Given(embeds, positions, Features.given(kwargs), masks_in(kwargs.get("attention_mask")))
        at_hand = self._at_hand(settings, backend, plan, given)
        if at_hand is not None:
            at_hand.replay(plan, given)
            # All of it is compared while the device is at work. A graph of what it was is of no use, but does no harm
            # as long as all that it reads is held.
            if self._state is not None and self._state.still_is:
                return self._results(at_hand, forward, kwargs), ""
            arena.wait()
            at_hand = None  # its memory may be wanted for a capture
        why = self._why_not_model(settings, backend)
        if why:
            return None, why
        found = self._found(arena, settings, backend, decoder, plan, given)
        if isinstance(found, str):
            return None, found
        found.replay(plan, given)
        return self._results(found, forward, kwargs), ""

    def _results(self, found: CapturedPrefill, forward: RoutedPrefill | DensePrefill, kwargs: Kwargs) -> Any:
        """What the decoder would return, copied from the graph that has been replayed; ``forward`` is told of it."""
        plan = forward.plan
        alignment = Alignment(plan, found.shape_class.num_stages, kwargs["inputs_embeds"].device)
        cache = self._cache(kwargs)
        if cache is not None:
            found.fill(cache, alignment)
        if isinstance(forward, RoutedPrefill):
            offsets = found.dropped() if plan.schedule.position_mode == "renumbered" else None
            forward.ran_elsewhere(cache, found.positions(alignment), offsets)
        else:
            forward.cache = cache
        rows, needed = found.shape_class.rows, needed_rows(plan)
        forward.graph = partial(_use, self._store.shape, plan.schedule, rows, needed, plan.batch, *self.held)
        forward.rows = rows
        return found.output(found.hidden(alignment), cache)

    def _at_hand(self, settings: Settings, backend: Backend, plan: Plan, given: Given) -> CapturedPrefill | None:
        """The graph for the prompts of ``plan``, if there was one and the decoder's weights lie where they lay then."""
        key = self._refusal_key(settings, backend)
        if self._state is None or self._refused.get(key, "unknown") or not _are_of(given, plan):
            return None
        own = ShapeClass.of(plan)
        best = self._store.best(self._key(settings, backend, plan, given, own), own, plan.schedule, needed_rows(plan))
        return best if best is not None and self._state.is_in_place else None

    def _why_not_model(self, settings: Settings, backend: Backend) -> str:
        """See ``eligible``; known until the decoder changes, and with it all that was captured is gone."""
        if self._state is None or not self._state.still_is:
            self._state, self._caches, self._reaches = DecoderState(self._adapter.text), None, None
            self._store.clear()
            self._refused.clear()
            self._added.clear()
        key = self._refusal_key(settings, backend)
        if key is None:
            return "a ranker of it has no hash, by which its graphs could be found"
        if key not in self._refused:
            self._refused[key] = why_not_model(self._adapter, settings, backend, self._state)
        return self._refused[key]

    def _refusal_key(self, settings: Settings, backend: Backend) -> Hashable | None:
        """What may be refused for all prompts. None if a ranker has no hash."""
        config = settings.config
        key = (
            (settings.schedule, config.action, config.trace, config.reopens),
            (backend.name, *_implementations(self._adapter)),
        )
        try:
            hash(key)
        except TypeError:
            return None
        return key

    def _found(
        self,
        arena: Arena,
        settings: Settings,
        backend: Backend,
        decoder: Decoder,
        plan: Plan,
        given: Given,
        *,
        at_once: bool = False,
    ) -> CapturedPrefill | str:
        """The graph for the prompts of ``plan``, captured if need be; or why there is none."""
        if not _are_of(given, plan):
            return "features that come between its layers are not one for each visual token"
        own, needed, schedule = ShapeClass.of(plan), needed_rows(plan), plan.schedule
        key = self._key(settings, backend, plan, given, own)
        best = self._store.best(key, own, schedule, needed)
        if best is not None:
            return best
        why = self._store.why_not(key, own, schedule, needed, at_once=at_once)
        if why:
            return why
        graph = self._captured(own, settings, backend, arena, decoder, plan, given)
        if isinstance(graph, CapturedPrefill):
            self._store.put(key, own, graph)
            return graph
        why = str(graph)
        if isinstance(graph, LacksMemory):
            arena.give_back()
        if isinstance(graph, CaptureFails) and not self._store:
            self._refused[self._refusal_key(settings, backend)] = why
        elif not isinstance(graph, NotNow):
            self._store.note(key, own, why)
        return why

    def _captured(
        self,
        own: ShapeClass,
        settings: Settings,
        backend: Backend,
        arena: Arena,
        decoder: Decoder,
        plan: Plan,
        given: Given,
    ) -> CapturedPrefill | CannotCapture:
        """A graph of class ``own``, or why there is none: not raised, as a traceback would hold the memory it took."""
        try:
            graph = CapturedPrefill(
                *(own, settings, self._adapter, backend, arena),
                masks=GivenMasks(given.masks),
                masked=self._masked(plan, given),
                added_before=self._added_before(given),
            )
            graph.capture(decoder, plan, given)
        except CannotCapture as error:
            error.__cause__ = error.__context__ = None
            return error.with_traceback(None)
        return graph

    def _key(self, settings: Settings, backend: Backend, plan: Plan, given: Given, own: ShapeClass) -> Hashable:
        """All that is baked into a graph beside its class, and that ``DecoderState`` does not watch."""
        masks = GivenMasks(given.masks).form, self._masked(plan, given)
        routing = (settings.schedule, settings.config.action, backend.name) if own.num_stages else None
        form = None if given.features is None else given.features.form
        return routing, form, masks, given.embeds.dtype, *_implementations(self._adapter)

    def _masked(self, plan: Plan, given: Given) -> frozenset[int]:
        """Layers that need the mask which they are given: all, if the call says it, or those that do not see all.

        Transformers has SDPA mask a window as soon as it is full; flash attention counts windows itself.
        """
        if given.masks is not None or True in self._adapter.sees_later:
            return frozenset(range(len(self._adapter.layers)))
        if self._reaches is None:
            reaches = {layer: self._adapter.reach(layer) for layer in self._adapter.attending}
            self._reaches = {layer: its for layer, its in reaches.items() if its is not None}
        if not self._reaches or mask_format_of(self._adapter.text_config) == "padding":
            return frozenset()
        longest = max(plan.lengths)
        return frozenset(layer for layer, its in self._reaches.items() if longest >= its)

    def _no_features(self, plan: Plan, embeds: torch.Tensor) -> Features | None:
        """Of zeros, in the form in which the decoder gets features with every prompt that has pictures."""
        form, mask = FeatureForm.of(self._adapter), np.zeros(embeds.shape[:2], dtype=bool)
        if form is None:
            return None
        for row, order, visual in zip(mask, plan.order, plan.visual, strict=True):
            row[np.flatnonzero(order >= 0)[visual]] = True
        none = embeds.new_zeros(sum(plan.visual_counts), embeds.shape[-1])
        return Features(form, (none,) * len(form.levels), torch.from_numpy(mask).to(embeds.device))

    def _added_before(self, given: Given) -> tuple[int, ...]:
        """Layers before which the decoder adds features. CannotCapture if it does something else with them."""
        if given.features is None:
            return ()
        form = given.features.form
        if form not in self._added:
            self._added[form] = added_before(self._adapter, form)
        layers = self._added[form]
        if layers is None:
            raise CannotCapture("features come between its layers, and are not simply added to visual tokens")
        return layers

    def _cache(self, kwargs: Kwargs) -> Cache | None:
        """What the call fills: its own cache, or the one that the decoder would make."""
        cache = cache_of(kwargs)
        use = kwargs.get("use_cache")
        if cache is None and (self._adapter.text_config.use_cache if use is None else use):
            if self._caches is None:
                self._caches = EmptyCaches(self._adapter.text_config)
            cache = self._caches.make()
        return cache


def _are_of(given: Given, plan: Plan) -> bool:
    """Whether features that come between layers, if there are any, are one for each visual token of ``plan``."""
    levels = () if given.features is None else given.features.levels
    return all(len(its) == sum(plan.visual_counts) for its in levels)


def _implementations(adapter: ModelAdapter) -> tuple[str, ...]:
    """Which of Transformers' functions the decoder calls, by its configuration as it is now."""
    config = adapter.text_config
    return config._attn_implementation, config._experts_implementation


def _use(
    shape: ModelShape,
    schedule: Schedule,
    rows: Sequence[int],
    needed: Sequence[int],
    batch: int,
    graphs: int,
    nbytes: int,
) -> GraphUse:
    """Of a replay, when somebody asks: nothing of it holds a graph or the model."""
    return GraphUse("", waste(shape, schedule, rows, needed, batch), graphs, nbytes)


def _nowhere(device: torch.device) -> str:
    return f"it runs on {device.type}, and graphs are made on {', '.join(RECORDERS)} only"


def _rotary(positions: torch.Tensor | None, axes: int) -> torch.Tensor | None:
    """Of M-RoPE the last ``axes`` rows, of which tables are made; one more before them is for masks."""
    return positions if positions is None or positions.ndim == 2 else positions[-axes:]
