"""The handle that ``reroute.enable`` returns: one model, one method, one backend."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch

from reroute_kernels import Backend, PagedPool, WarmUp, load_kernels
from reroute_kernels.dispatch import recorded_by_autograd

from .checks import is_count, shown
from .config import RoutingConfig, Settings, check_arguments
from .core.cost import ModelShape
from .core.home import Home, PooledHome, RecordedHome, is_recorded
from .core.plan import Plan
from .core.prefill import PositionTables
from .core.schedule import Action, Schedule
from .core.workspace import Workspace
from .errors import RerouteError
from .graphs import Graphs, check_device
from .methods import Method
from .stats import Stats, Totals, make_stats
from .trace import Trace
from .transformers import ModelAdapter, Prompt, Router
from .transformers.cache import layer_rows
from .transformers.context import DensePrefill, RoutedPrefill
from .transformers.graphs import Replays
from .warm_up import ShortPrefills, long_prompts

__all__ = ["Handle"]

logger = logging.getLogger("reroute")

MOST_UNSETTLED = 64
"""Prefills of which statistics are not made yet: each holds its plan."""


class Handle:
    """Routing of one model, from ``enable`` to ``disable``. Also a context manager.

    ``config``: its settings. ``schedule``: what they mean for this model. ``backend``: what runs the operations.
    """

    def __init__(self, adapter: ModelAdapter, config: RoutingConfig, pool: PagedPool | None) -> None:
        """Check everything but leave the model alone until ``attach``; ``reroute.enable`` does both.

        Raises:
            RerouteError: the model or the schedule cannot be routed; nothing is changed then.
            BackendUnavailable: the backend cannot run on the decoder's device.
        """
        self.config = config
        planned = config.for_model(len(adapter.layers))
        settings = planned.moved(len(adapter.layers), adapter.may_decide)
        self.schedule = settings.schedule
        if self.schedule.layers != planned.schedule.layers:
            logger.info(
                "%s decides before layers %s of this model instead of %s, where it may not (sliding windows, or "
                "features of pictures that come between layers)",
                config.method_name,
                self.schedule.layers,
                planned.schedule.layers,
            )
        self._pool, self._pool_is_given = pool, pool is not None
        self._shape = ModelShape.from_config(adapter.text_config)
        if pool is not None and pool.width != self._shape.hidden:
            raise RerouteError(
                f"The pool holds rows of {pool.width} features, the model's have {self._shape.hidden}. "
                f"Make it with PagedPool({self._shape.hidden}, …)."
            )
        self._trace: Trace | None = None
        self._totals, self._recording = Totals(), threading.Lock()
        self._unsettled: list[Callable[..., Stats]] = []
        self._callbacks: tuple[tuple[Callable[[Stats], None]], ...] = ()
        device = next(adapter.text.parameters()).device
        replays = None
        if isinstance(config.graphs, Graphs):
            check_device(device)
            replays = Replays(config.graphs, adapter, self._shape, self._backend_on)
        self._router = Router(adapter, settings, self._home_of, self._done, replays)
        self._choose_backend(device)
        self._stats = Stats(**self._names(settings, self.backend))

    def attach(self, model: Any, replaced: Handle | None = None) -> None:
        """Route ``model``, to which the adapter is bound, instead of ``replaced``.

        Raises:
            RerouteError: the model is in use, or shares parts with another one that is routed; nothing is changed then.
        """
        self._router.check_free(model, None if replaced is None else replaced._router)
        self._router.attach(model, None if replaced is None else replaced._router)
        if replaced is not None:
            replaced.disable()

    def _follow(self, device: torch.device) -> None:
        if device != self._device:  # the model has moved
            self._choose_backend(device)

    def _choose_backend(self, device: torch.device) -> None:
        self.backend: Backend = self.config.backend_on(device)
        self._device = device

    def _backend_on(self, device: torch.device) -> Backend:
        self._follow(device)
        return self.backend

    def _names(self, settings: Settings, backend: Backend) -> dict[str, Any]:
        return {
            "method": settings.config.method_name,
            "action": settings.config.action,
            "backend": backend.name,
            "backend_reason": backend.reason,
        }

    def _settings_in_words(self) -> str:
        """What all processes that share the model must have alike."""
        schedule = self.schedule
        rankers = ", ".join(dict.fromkeys(type(ranker).__name__ for ranker in schedule.rankers))
        said = f"{self.config.action} before {schedule.layers} at {schedule.ratios} by {rankers}, {self.backend.name}"
        return f"{said}, choosing again" if self.config.reopens else said

    def __repr__(self) -> str:
        """What it does, for who looks at it in a notebook."""
        state = "enabled" if self.is_enabled else "disabled"
        return f"<Handle: {self.config.in_words}, backend {self.backend.name}, {state}>"

    @property
    def is_enabled(self) -> bool:
        """Whether the model is routed by this handle."""
        return self._router.is_attached

    def disable(self) -> None:
        """Restore the model exactly. Idempotent.

        A cache filled while routing was on needs it on to be continued.

        Raises:
            RerouteError: a call of the model runs, in whatever thread; nothing is changed then.
        """
        self._router.detach()
        self._pool = None

    def idle(self) -> AbstractContextManager[None]:
        """No call of the model runs inside; those that begin meanwhile wait. RerouteError if one runs."""
        return self._router.idle()

    def __enter__(self) -> Handle:
        """Routing is on since ``enable``, and stays so until the block ends.

        Raises:
            RerouteError: it was disabled or replaced meanwhile.
        """
        self._router.begin_block()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disable."""
        self._router.end_block()
        self.disable()

    def at(
        self,
        *,
        config: RoutingConfig | None = None,
        method: str | Method | None = None,
        action: Action | None = None,
        keep: float | None = None,
        schedule: Schedule | None = None,
        reopens: bool | None = None,
    ) -> AbstractContextManager[None]:
        """Settings for the calls that this thread (or task) makes inside ``with``, whatever other threads do::

            with handle.at(keep=0.2):
                model.generate(**inputs)

        What is not given stays as it is; a ``schedule`` replaces ``method`` and ``keep``, and either of
        them a ``schedule``. ``config`` gives all at once. The backend and whether decisions are traced belong to the
        model. A thread that is started inside does not inherit them.

        Raises:
            RerouteError: the model cannot be routed by them, or routing is disabled.
        """
        check_arguments(config, None)
        if config is None:
            config = self.config.changed(method=method, action=action, keep=keep, schedule=schedule, reopens=reopens)
        elif any(setting is not None for setting in (method, action, keep, schedule, reopens)):
            raise RerouteError("Give either config= or single settings, not both.")
        layers = self._shape.num_layers
        return self._router.at(config.for_model(layers).moved(layers, self._router.adapter.may_decide))

    def on_prefill(self, callback: Callable[[Stats], None]) -> Callable[[], None]:
        """Call ``callback`` with the stats of each prefill, in the thread that ran it, when it has ended.

        Returns a function that ends this. What ``callback`` raises is raised by the forward.

        Raises:
            RerouteError: it cannot be called.
        """
        if not callable(callback):
            raise RerouteError(f"A callback is a function of one argument, the stats, not {shown(callback)}.")
        entry = (callback,)  # of this call alone: the same function may be given twice
        with self._recording:
            self._callbacks = (*self._callbacks, entry)

        def end() -> None:
            with self._recording:
                self._callbacks = tuple(other for other in self._callbacks if other is not entry)

        return end

    def stats(self) -> Stats:
        """Budget of the last prefill with visual tokens, whether its plan deferred any of them or not."""
        with self._recording:
            self._settle()
            return self._stats

    def totals(self) -> Totals:
        """Sums and means over all prefills with visual tokens since ``enable``, by whatever thread."""
        with self._recording:
            self._settle()
            return self._totals

    @property
    def trace(self) -> Trace | None:
        """Decisions of the last prefill with visual tokens (``enable(..., trace=True)``).

        None before the first one, and after one whose plan kept everything (``keep=1``): nothing was decided.
        """
        if not self.config.trace:
            raise RerouteError("Tracing is off: pass trace=True to reroute.enable.")
        return self._trace

    def plan(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        *,
        labels: torch.Tensor | None = None,
        visual_mask: torch.Tensor | None = None,
    ) -> Plan | None:
        """Read a prompt (B, L) ahead of its prefill: the one step that waits for the device.

        Args:
            input_ids: (B, L), whose placeholders are the visual tokens.
            attention_mask: (B, past + L), False at padding; all are tokens without one.
            cache: the one that the prefill will go on with, if any.
            labels: (B, L), if the forward will get them: the prompt ends where the answer begins.
            visual_mask: (B, L) bool, True at visual tokens, instead of ``input_ids``: for prompts as ``inputs_embeds``,
                which do not show where they are.

        Returns:
            None if there are no visual tokens. Use it with ``using``: for ``model(inputs_embeds=…)`` and
            ``model.generate(inputs_embeds=…)``, or to capture a prefill in a CUDA graph.

        Raises:
            RerouteError: this prompt cannot be routed, not just one of ``input_ids`` and ``visual_mask`` is given, or
                routing is disabled.
        """
        return self._router.plan(Prompt(input_ids, attention_mask, None, cache, labels, visual=visual_mask))

    def using(self, plan: Plan | None) -> AbstractContextManager[None]:
        """Run the forwards inside ``with`` on ``plan``, without looking at their ids; None routes nothing.

        They share one place in the pool, which is held until the block ends: after one forward the next may be captured
        in a CUDA graph, which must not be replayed once the block has ended. One that runs while another does, in a
        hook or a thread, has a place of its own. Single decoding steps go on as they do outside; a call of any other
        shape than the plan's raises RerouteError.

        Raises:
            RerouteError: it is no plan, or routing is disabled.
        """
        return self._router.using(plan)

    @torch.no_grad()
    def warm_up(self, *, visual: int, batch: int = 1, text: int | None = None) -> WarmUp:
        """Compile and load, before serving, every kernel that prefills up to this size can need.

        Args:
            visual: most visual tokens N of one prompt.
            batch: most prompts of one prefill.
            text: with ``graphs=True``, text tokens M of a prompt. The class of ``batch`` prompts of ``visual`` and
                ``text`` tokens is captured then, unless it has a graph: the first of them is replayed already. Begin
                with the largest: if one needs more memory than there is, graphs before it are captured anew later.

        Returns:
            These kernels, how long each took and whether Triton had its binary; none on the torch backend. It prints
            as a table.

        Runs prefills of a few tokens without their layers. Nothing waits for the device; stats and trace stay as they
        are. Call it under the autocast of the prefills to come, and again once the model has moved or its dtype has
        changed.

        Raises:
            RerouteError: routing was disabled, a size is below 1, no graph can be captured, or FSDP2 shards the
                decoder; says why.
        """
        if self._router.adapter.is_sharded:
            raise RerouteError(
                "FSDP2 gathers the decoder's weights when it runs, in all processes, and a warm-up runs no layer. Call "
                "the model once with a picture of that size in each process instead."
            )
        if text is not None and not self.config.graphs:
            raise RerouteError("A warm-up with text= captures a graph: pass graphs=True to reroute.enable too.")
        if not (is_count(visual) and is_count(batch) and (text is None or is_count(text))):
            raise RerouteError(
                f"A warm-up is for at least one visual token and one prompt, not {visual=}, {batch=}, {text=}."
            )
        settings = self._router.settings
        short = ShortPrefills(self._router.adapter, settings)
        pool = self._place(short.hidden, short.tables)
        if settings.keeps_all:
            ready = WarmUp(self.backend.name, "every visual token is kept", visual, batch, ())
        else:
            ready = load_kernels(self.backend, visual, batch, lambda backend: short.run(backend, pool, batch))
        if text is not None:
            why = self._router.capture(*long_prompts(self._router.adapter, settings, visual, text, batch))
            if why:
                raise RerouteError(
                    f"No graph can be captured for {batch} prompts of {visual} visual and {text} text tokens: {why}."
                )
        return ready

    def _place(self, hidden: torch.Tensor, tables: PositionTables) -> PagedPool:
        """The pool for a prefill of ``hidden``; it is where ``tables`` are, and so the backend is chosen for there."""
        pool, device = self._pool, tables.cos.device
        self._follow(device)
        fits = pool is not None and (pool.dtype, pool.device) == (hidden.dtype, device)
        if pool is None or not (fits or self._pool_is_given):
            pool = self._pool = PagedPool.shared(hidden.shape[-1], hidden.dtype, device)
        elif not fits:
            raise RerouteError(
                f"The pool holds {pool.dtype} on {pool.device}, the model runs {hidden.dtype} on {device}. "
                "Make the pool with the model's dtype and device, or pass none."
            )
        return pool

    def _home_of(self, plan: Plan, hidden: torch.Tensor, tables: PositionTables, workspace: Workspace | None) -> Home:
        device = tables.cos.device
        if is_recorded(hidden, self._router.adapter.text.parameters()):
            self._follow(device)
            return RecordedHome(plan, recorded_by_autograd(self.backend), hidden, device)
        pool = self._place(hidden, tables)
        return PooledHome(plan, self.backend, pool, workspace)

    def _done(self, forward: RoutedPrefill | DensePrefill) -> None:
        prefill, settings = forward.prefill, forward.settings
        plan, graph, rows = forward.plan, forward.graph, forward.rows
        layers = layer_rows(forward.cache, plan.past + plan.length)
        names = self._names(settings, self.backend if prefill is None else prefill.backend)
        shape = self._shape
        if settings.needs_vision:
            shape = replace(shape, tower=self._router.adapter.tower.shape)

        def make(prefills: int) -> Stats:  # keeps nothing of the call alive
            return make_stats(plan, shape, names, layers(), prefills=prefills, graph=graph, rows=rows)

        with self._recording:
            self._unsettled.append(make)
            self._trace = None if prefill is None else prefill.trace
            callbacks = self._callbacks
            # Of a replay they would cost a good part of what it takes: so they are made when somebody asks.
            if callbacks or len(self._unsettled) == MOST_UNSETTLED:
                self._settle()
            stats = self._stats
        for (callback,) in callbacks:
            callback(stats)

    def _settle(self) -> None:
        """Make the statistics of all prefills so far."""
        while self._unsettled:
            make = self._unsettled.pop(0)  # first: a ranker whose own count fails costs this one alone
            self._stats = make(prefills=self._totals.prefills + 1)
            self._totals = self._totals.plus(self._stats)
