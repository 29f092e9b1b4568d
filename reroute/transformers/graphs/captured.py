"""One prefill of a decoder, recorded on static memory, that serves all prompts of a shape class."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers.utils.generic import ModelOutput

from reroute_kernels import Backend
from reroute_kernels.recorder import CannotRecordNow
from reroute_kernels.upload import upload_to

from ...config import Settings
from ...core.plan import Plan
from ...graphs import Alignment, Arena, ClassPlan, PromptTable, ShapeClass, StaticHome, class_tensors
from ..adapters import Features, ModelAdapter
from ..forward import FORWARD
from .added import AddedStates
from .forwards import DenseInGraph, InGraph, RoutedInGraph
from .masks import GivenMasks
from .refused import CannotCapture, CaptureFails, LacksMemory, NotNow
from .stage_cache import StageCache

__all__ = ["CapturedPrefill", "Given"]


FAILURES = {torch.OutOfMemoryError: LacksMemory, CannotRecordNow: NotNow}
"""What errors of a capture mean; others are CUDA's refusals."""
NO_MASK = (0, 0, 0, 0)
"""Shape of a mask that Transformers takes as it is. Without one it makes one in a capture, of L x L in each replay."""


@dataclass(frozen=True)
class Given:
    """What a decoder is called with.

    - ``embeds`` (B, L', C).
    - ``positions``: position ids (B or 1, L'), or (axes, B or 1, L') of M-RoPE; None: 0, 1, 2, …
    - ``features``: of the pictures, that it adds between its layers.
    - ``masks``: (B or 1, 1, L', L'), True where visible, or None, by kinds of layers; None: it makes them itself.
    """

    embeds: torch.Tensor
    positions: torch.Tensor | None
    features: Features | None = None
    masks: Mapping[str, torch.Tensor | None] | None = None


class CapturedPrefill:
    """The graph of ``shape_class``. All of its methods need a turn of ``arena``."""

    def __init__(
        self,
        shape_class: ShapeClass,
        settings: Settings,
        adapter: ModelAdapter,
        backend: Backend,
        arena: Arena,
        masks: GivenMasks,
        masked: frozenset[int],
        added_before: Sequence[int] = (),
    ) -> None:
        """Nothing is captured yet.

        ``masked``: layers that need the mask which they are given. ``added_before``: layers before which the decoder
        adds features of the pictures.
        """
        self.shape_class, self._settings, self._adapter = shape_class, settings, adapter
        self._backend, self._arena = backend, arena
        self._plan: ClassPlan | None = None
        begins = [0, len(adapter.layers)]
        if shape_class.num_stages:
            schedule = settings.schedule
            self._plan = ClassPlan.of(shape_class, schedule, settings.config.action)
            begins[1:1] = schedule.layers
        length = shape_class.rows[0]
        self._table = PromptTable(
            shape_class,
            tuple(b * length for b in range(shape_class.batch)),
            shape_class.home_rows,
        )
        self._cache = StageCache(adapter, [range(*stage) for stage in pairwise(begins)])
        self._added, self._masks, self._masked = AddedStates(added_before), masks, masked
        self._constants: Sequence[torch.Tensor] = ()
        self._replay: Callable[[], None] | None = None

    def capture(self, decoder: Callable[..., Any], plan: Plan, given: Given) -> None:
        """Record a prefill of ``given`` by ``decoder``, the decoder's own call, where ``plan`` is that of the prompts.

        Raises:
            CannotCapture: the decoder is not one that can be, or there is no memory for it.
        """
        recorder = self._arena.recorder
        try:
            with torch.no_grad():
                self._place(given)
                self._fill(plan, given)
                recorder.rehearse(lambda: self._run(decoder))
                self._place(given)
                self._fill(plan, given)
                self._replay = recorder.record(lambda: self._run(decoder))
        except RuntimeError as error:
            kind = next((its for of, its in FAILURES.items() if isinstance(error, of)), CaptureFails)
            raise kind(f"its capture fails ({type(error).__name__}: {error})") from error

    def replay(self, plan: Plan, given: Given) -> None:
        """Serve the prompts of ``plan``. What comes out stays where it is until the turn ends."""
        assert self._replay is not None
        self._arena.lend(*self._constants)
        self._fill(plan, given)
        self._replay()

    def hidden(self, alignment: Alignment) -> torch.Tensor:
        """A copy (B, L', C) of what the decoder returns."""
        return alignment.hidden(self._hidden)

    def fill(self, cache: Any, alignment: Alignment) -> None:
        """Fill an empty ``cache`` with copies."""
        self._cache.copy_to(cache, alignment)

    def positions(self, alignment: Alignment) -> list[torch.Tensor]:
        """Copies: logical position (B, T) of each row that each stage has run, -1 for fillers."""
        return alignment.positions(self._columns, self.shape_class.rows[1:])

    def dropped(self) -> torch.Tensor:
        """A copy (stages, B): how many rows of each sample no stage has run."""
        return self._parts["dropped"].clone()

    def output(self, hidden: torch.Tensor, cache: Any) -> Any:
        """What the decoder returns, with ``hidden`` and ``cache``."""
        kind, field = self._output
        return kind(last_hidden_state=hidden, **({} if cache is None else {field: cache}))

    # --- static memory ----------------------------------------------------------------------------------------------

    def _place(self, given: Given) -> None:
        """Have places in the arena for all that is known so far."""
        batch, (length, *rows) = self.shape_class.batch, self.shape_class.rows
        width, dtype = given.embeds.shape[-1], given.embeds.dtype
        states = ((batch, length, width), dtype)
        axes = (batch, length) if self._adapter.position_axes == 1 else (self._adapter.position_axes, batch, length)
        added, masks = self._added.layout(*states), self._masks.layout(batch, length)
        buffers = self._cache.layout if self._cache.is_known else []
        (
            self._embeds,
            self._positions,
            self._packed,
            home,
            self._hidden,
            self._columns,
            *stored,
        ) = self._arena.views(
            [
                states,
                (axes, torch.int64),
                ((self._table.size,), torch.int64),
                ((self.shape_class.home_rows, width), dtype),
                states,
                ((batch * sum(rows),), torch.int64),
                *added,
                *masks,
                *buffers,
            ]
        )
        self._added.place_in(stored[: len(added)])
        stored = stored[len(added) :]
        self._masks.place_in(stored[: len(masks)])
        self._parts = self._table.views(self._packed)
        self._cache.store_in(stored[len(masks) :])
        if self._plan is not None:
            self._tensors = class_tensors(self._plan, self._table, self._parts)
            self._home = StaticHome(self._backend, self._tensors, home)
            self._constants = self._tensors.visual_indices, self._home.table

    def _fill(self, plan: Plan, given: Given) -> None:
        """Tell the graph of its prompts: an upload, and a gather of each of the two that come from the caller."""
        upload_to(self._packed, self._table.packed(plan))
        sources = self._parts["sources"].view(-1)
        embeds, positions, length = given.embeds, given.positions, given.embeds.shape[1]
        torch.index_select(embeds.flatten(0, 1), 0, sources, out=self._embeds.flatten(0, 1))
        self._added.fill(given.features, sources)
        self._masks.fill(given.masks, self._parts["sources"], self._parts["beyond"])
        if positions is None:
            torch.remainder(self._parts["sources"], length, out=self._positions)
        else:
            flat = positions.expand(*positions.shape[:-2], plan.batch, length).flatten(-2)
            torch.index_select(flat, -1, sources, out=self._positions.flatten(-2))

    # --- what is recorded -------------------------------------------------------------------------------------------

    def _mask(self) -> Any:
        """What the decoder gets as its mask: those that were given, or none where layers need those that it makes.

        Where a token would see what comes later without a mask, it would see fillers.
        """
        is_real = self._parts["rows"] >= 0
        seen = is_real[:, None, None].expand(-1, 1, is_real.shape[1], -1) if True in self._adapter.sees_later else None
        if self._masks.form is not None:
            return self._masks.argument(otherwise=seen)
        if self._masked:
            return seen
        return self._embeds.new_empty(NO_MASK)

    def _run(self, decoder: Callable[..., Any]) -> None:
        forward: RoutedInGraph | DenseInGraph
        layers = InGraph(self._adapter, self._added, self._masked, self._parts["rows"] >= 0)
        if self._plan is None:
            shape = self.shape_class.batch, self.shape_class.rows[0]
            forward = DenseInGraph(self._adapter, shape, layers)
        else:
            self._home.clear()
            forward = RoutedInGraph(
                *(self._plan, self._settings, self._adapter, lambda *_: self._home),
                layers=layers,
            )
        cache = self._cache.begin()
        name = "cache" if "cache" in inspect.signature(self._adapter.text.forward).parameters else "past_key_values"
        try:
            output = decoder(
                inputs_embeds=self._embeds,
                attention_mask=self._mask(),
                position_ids=self._positions + self._parts["beyond"],
                use_cache=True,
                **{name: cache, FORWARD: forward},
            )
        finally:
            forward.close()
        self._cache.end()
        self._output = type(output), _cache_field(output, cache)
        hidden = output.last_hidden_state
        if (hidden.shape, hidden.dtype) != (self._hidden.shape, self._hidden.dtype):
            raise CannotCapture("the decoder returns hidden states of another size or dtype than it gets")
        self._hidden.copy_(hidden)
        rows = [self.shape_class.batch * count for count in self.shape_class.rows[1:]]
        for target, positions in zip(self._columns.split(rows), forward.columns, strict=True) if rows else ():
            target.copy_(positions.flatten())


def _cache_field(output: Any, cache: Any) -> str:
    """The field of ``output`` that holds ``cache``. CannotCapture if there is more than that and hidden states."""
    if not isinstance(output, ModelOutput):
        raise CannotCapture(f"the decoder returns a {type(output).__name__}, in which nothing has a name")
    others = [name for name, value in output.items() if name != "last_hidden_state" and value is not None]
    if len(others) != 1 or output[others[0]] is not cache:
        raise CannotCapture(f"the decoder returns {', '.join(others)} beside hidden states")
    return str(others[0])
