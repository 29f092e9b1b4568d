"""Routing of one model: puts entrances before its parts, opens the forward of each call, and takes all away again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from transformers.cache_utils import Cache

from ..checks import shown
from ..config import Settings
from ..core.plan import Plan
from ..errors import RerouteError
from .adapters import ModelAdapter
from .cache import cache_of, is_routed, is_torn, past_length, states_of
from .calls import Call
from .context import DensePrefill, HomeFactory, RoutedPrefill
from .decoding import RoutedDecode
from .entrances import RoutedDecoder, RoutedDecoderLayer, RoutedTower, RoutedTowerLayer, callers
from .forward import ForwardContext
from .graphs import Replays, why_not_prompt
from .interception import Role, intercept, own_method, role_of
from .planner import Planner
from .prompt import Prompt, has_picture
from .scopes import Given, Scopes
from .vision import TowerRun, recording_of

__all__ = ["Router"]

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]

_DISABLED = "Routing of this model was disabled. Call reroute.enable for a new handle."
_BUSY = (
    "A forward or a generation of this model runs, and would go on with other settings than it began with. Wait for "
    "it, or use handle.at(…), which gives calls settings of their own."
)


class Router:
    """Routes the calls of one model between ``attach`` and ``detach``, from any thread.

    ``start`` makes the prefill of a plan; ``done`` is told of every prefill with a plan that succeeded.
    ``replays``: its graphs, if prefills are replayed.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        settings: Settings,
        home: HomeFactory,
        done: Callable[[RoutedPrefill | DensePrefill], None],
        replays: Replays | None = None,
    ) -> None:
        """Check that ``adapter``'s model can be routed by ``settings``.

        Raises:
            RerouteError: the schedule does not fit the model, or the model's attention cannot be routed.
        """
        self._planner: Planner | None = Planner(adapter)
        self._planner.check(settings)
        self._settings = settings
        self._home, self._done, self._replays = home, done, replays
        self._entrances = ExitStack()
        self._lock = threading.RLock()
        self._scopes = Scopes()
        self._is_attached, self._is_tower_attached, self._blocks = False, False, 0
        self._running: WeakSet[Call] = WeakSet()

    # --- the model ------------------------------------------------------------------------------------------------

    def check_free(self, model: Any, replaced: Router | None) -> None:
        """Check that no part of ``model`` is routed by another router than ``replaced``.

        Raises:
            RerouteError: two models share a part.
        """
        tower = self._tower_parts() if self._settings.needs_vision else ()
        for module in (model, self.adapter.base, self.adapter.text, *self.adapter.layers, *tower):
            role = role_of(module)
            if role is not None and role.router is not replaced:
                raise RerouteError(
                    f"{type(module).__name__} is a part of another model that is routed. Disable routing of that one "
                    "first, or give each model modules of its own."
                )

    def attach(self, model: Any, replaced: Router | None = None) -> None:
        """Put entrances before the parts of ``model``, before all of them or none; or take those of ``replaced``.

        Calls that others make meanwhile wait.

        Raises:
            RerouteError: ``replaced`` routes a call, or is in a ``with`` block; nothing is changed then.
        """
        if replaced is None:
            self._attach(model)
            return
        with replaced.idle(for_another=True):
            self._attach(model, replaced)
            replaced.detach()

    def _attach(self, model: Any, replaced: Router | None = None) -> None:
        adapter, role = self.adapter, Role(self)
        # From the inside out: what finds one entrance finds all behind it, also in a thread that calls meanwhile.
        parts = [
            *((layer, RoutedDecoderLayer, Role(self, index)) for index, layer in enumerate(adapter.layers)),
            *((module, kind, role) for module, kind in callers(adapter, model)),
        ]
        _forget_compiled()
        with ExitStack() as entrances:
            entrances.callback(setattr, self, "_is_attached", False)
            self._is_attached = True
            for module, kind, its in parts:
                entrances.callback(intercept(module, kind, its, replaced))
            if self._settings.needs_vision:
                self._attach_tower(entrances, replaced)
            self._entrances = entrances.pop_all()

    def _attach_tower(self, entrances: ExitStack, replaced: Router | None = None) -> None:
        """Put entrances before the vision tower too, once some settings ask for what happens there."""
        *layers, tower = self._tower_parts()
        with ExitStack() as its:
            for index, layer in enumerate(layers):
                its.callback(intercept(layer, RoutedTowerLayer, Role(self, index), replaced))
            its.callback(intercept(tower, RoutedTower, Role(self), replaced))
            entrances.enter_context(its.pop_all())
        self._is_tower_attached = True

    def _tower_parts(self) -> tuple[Any, ...]:
        """The layers of the vision tower, and the tower."""
        return *self.adapter.tower.layers, self.adapter.tower.module

    def detach(self) -> None:
        """Undo ``attach`` and let go of the model. Idempotent.

        Raises:
            RerouteError: a call of the model runs; nothing is changed then.
        """
        with self.idle():
            was_attached, self._is_attached = self._is_attached, False
        try:
            if was_attached:
                _forget_compiled()
        finally:  # an interrupt then, and nothing of it is left
            with self._lock:  # others may detach it too
                self._entrances.close()
            self._planner = self._replays = None

    @contextmanager
    def idle(self, *, for_another: bool = False) -> Iterator[None]:
        """No call of the model runs inside; those that begin meanwhile wait.

        Raises:
            RerouteError: one runs, or ``for_another`` router the model would leave a ``with`` block.
        """
        with self._lock:
            if self._running:
                raise RerouteError(_BUSY)
            if for_another and (self._blocks or self._scopes.any_open):
                raise RerouteError(
                    "This model is routed in a with block that has not ended. Use handle.at(…) of that handle to give "
                    "calls settings of their own, or end the block first."
                )
            yield

    @property
    def adapter(self) -> ModelAdapter:
        """The model's. RerouteError once routing is disabled."""
        return self._active_planner.adapter

    @property
    def _active_planner(self) -> Planner:
        if self._planner is None:
            raise RerouteError(_DISABLED)
        return self._planner

    @property
    def is_attached(self) -> bool:
        """Whether a model is routed."""
        return self._is_attached

    def begin_block(self) -> None:
        """Stay until ``end_block``, whoever else enables routing. RerouteError once routing is disabled."""
        with self._lock:
            if not self._is_attached:
                raise RerouteError(_DISABLED)
            self._blocks += 1

    def end_block(self) -> None:
        """Undo ``begin_block``."""
        with self._lock:
            self._blocks -= 1

    # --- calls ----------------------------------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """Of a call that is made here and now."""
        return self._scopes.settings or self._settings

    def at(self, settings: Settings) -> AbstractContextManager[None]:
        """Route the calls that this thread or task makes inside ``with`` by ``settings``.

        Raises:
            RerouteError: the model cannot be routed by them, or routing is disabled.
        """
        self._active_planner.check(settings)
        with self._lock:
            if settings.needs_vision and self._is_attached and not self._is_tower_attached:
                _forget_compiled()
                self._attach_tower(self._entrances)
        return self._attached(self._scopes.at(settings))

    def using(self, plan: Plan | None) -> AbstractContextManager[None]:
        """Use ``plan`` for the calls of this thread inside ``with``. RerouteError once routing is disabled."""
        _ = self._active_planner
        if not isinstance(plan, Plan | None):
            raise RerouteError(f"What is used is a plan, as handle.plan(…) returns it, not {shown(plan)}.")
        return self._attached(self._scopes.using(plan))

    @contextmanager
    def _attached(self, block: AbstractContextManager[None]) -> Iterator[None]:
        """``block``, which keeps others from replacing this router. RerouteError if that has happened before."""
        with block:
            with self._lock:
                if not self._is_attached:
                    raise RerouteError(_DISABLED)
            yield

    def plan(self, prompt: Prompt) -> Plan | None:
        """Plan a prefill ahead. RerouteError if it cannot be routed, or routing is disabled."""
        return self._active_planner.plan(prompt, self.settings)

    def enter(self, call: Call) -> bool:
        """Take note of a call that begins, unless routing is disabled. ``leave`` ends it."""
        with self._lock:
            if self._is_attached:
                call.router = self
                self._running.add(call)
            return self._is_attached

    def leave(self, call: Call) -> None:
        """Take note of a call that ends."""
        with self._lock:
            self._running.discard(call)

    def may_be_compiled(self) -> bool:
        """Whether compiled code may call the parts of the model as if routing were off: every token is kept.

        Raises:
            RerouteError: the model is exported, and would lose its routing.
        """
        if self._settings.keeps_all and not self._scopes.any_open:
            return True
        if torch.compiler.is_exporting():
            raise RerouteError(
                "A routed model cannot be exported: its shapes depend on the prompt. Call reroute.disable(model) first."
            )
        return False

    def check_base(self, model: Any) -> None:
        """Check that the whole ``model`` calls what is routed. RerouteError if it would be routed, and does not."""
        if not self.settings.keeps_all:
            self.adapter.check_base(model)

    @property
    def plans_prefills(self) -> bool:
        """Whether anything hangs on the plan of a prefill that is made here and now, apart from its statistics."""
        return self._replays is not None or not self.settings.keeps_all

    def labels_of(self, args: Args, kwargs: Kwargs) -> Any:
        """The labels in a call of the whole model."""
        return _named(self.adapter.model_parameters, args, kwargs).get("labels")

    def open(self, args: Args, kwargs: Kwargs, labels: torch.Tensor | None, end: int | None) -> ForwardContext | None:
        """The forward of a call of the base model; None where there is nothing to do for routing.

        ``labels`` are those of the whole model's call; ``end`` is where the prompt of ``generate`` ends.

        Raises:
            RerouteError: the call cannot be routed; nothing is changed then.
        """
        named = _named(self.adapter.base_parameters, args, kwargs)
        cache = cache_of(named)
        tokens = named.get("inputs_embeds") if named.get("input_ids") is None else named["input_ids"]
        if tokens is None:
            return None  # Transformers raises
        has_routed_cache = is_routed(cache)
        if cache is not None and (has_routed_cache or is_torn(cache)):
            self._active_planner.check_follower(named, cache, tokens)
        settings = self.settings
        plan, workspace = self._plan_of(named, settings, tokens, cache, labels, end)
        forward: ForwardContext | None = None
        if plan is not None and not plan.changes_nothing:
            record = named.get("output_hidden_states")
            record = getattr(self.adapter.text_config, "output_hidden_states", False) if record is None else record
            states = record is not False  # or which ones
            recording = recording_of(self.adapter, plan, named)
            forward = RoutedPrefill(
                plan,
                settings,
                self.adapter,
                self._home,
                workspace,
                kept=states_of(cache),
                recording=recording,
                record_states=states,
                trace=self._settings.config.trace,
            )
            forward.keep(cache)
            forward.asks_eager = self._asks_eager(plan, named, labels)
            return forward
        if plan is not None:
            forward = DensePrefill(plan, settings, self.adapter)
            forward.asks_eager = self._asks_eager(plan, named, labels)
        elif has_routed_cache:
            # Of what is not planned it is not known where its visual tokens are, if it has any.
            is_text = tokens.shape[1] == 1 or not (named.get("input_ids") is None or has_picture(named))
            forward = RoutedDecode(self.adapter, tuple(tokens.shape[:2]), states_of(cache) if is_text else None)
        if forward is not None and has_routed_cache:
            forward.keep(cache)
        return forward

    def replay(self, forward: ForwardContext, decoder: Callable[..., Any], kwargs: Kwargs) -> Any:
        """What ``decoder``, the decoder's own call, would return; None if it has to be called with ``kwargs``."""
        if self._replays is None or not isinstance(forward, RoutedPrefill | DensePrefill):
            return None
        given = dict(kwargs)
        if forward.made_mask is not None:
            given["attention_mask"] = forward.made_mask.of_prompt(given.get("attention_mask"), forward.plan.length)
        return self._replays.run(forward, decoder, given, forward.asks_eager)

    def capture(self, plan: Plan, embeds: torch.Tensor, positions: torch.Tensor) -> str:
        """Capture the graph of the class of ``plan``; why not, if it cannot be. See ``Handle.warm_up``."""
        assert self._replays is not None
        decoder = own_method(RoutedDecoder, self.adapter.text, "__call__")
        return self._replays.capture(self.settings, decoder, plan, embeds, positions)

    def _asks_eager(self, plan: Plan, named: Kwargs, labels: torch.Tensor | None) -> str:
        """Why a call of the base model is none that could be replayed, as far as it is known before it begins."""
        if self._replays is None:
            return ""
        return why_not_prompt(self.adapter, plan, named, labels, is_given=self._scopes.given is not None)

    def tower_run(self, args: Args, kwargs: Kwargs, *, is_for_one: bool) -> TowerRun | None:
        """What to keep of a run of the vision tower that begins here and now; None if nobody will look at it.

        ``is_for_one``: whether ``generate`` makes features of it, for one prefill.

        Raises:
            RerouteError: features are made of it in another way than is known.
        """
        settings, tower = self.settings, self.adapter.tower
        if not settings.needs_vision:
            return None
        wanted = tower.wanted_by(settings.schedule.rankers)
        return TowerRun(tower, tower.images(args, kwargs), wanted, is_for_one=is_for_one)

    def finish(self, forward: ForwardContext) -> None:
        """End a forward that succeeded."""
        forward.finish()
        if isinstance(forward, RoutedPrefill | DensePrefill):
            self._done(forward)

    def _plan_of(
        self,
        named: Kwargs,
        settings: Settings,
        tokens: torch.Tensor,
        cache: Cache | None,
        labels: torch.Tensor | None,
        end: int | None,
    ) -> Given:
        given, is_step = self._scopes.given, tokens.shape[1] == 1
        if given is None or (is_step and past_length(cache)):
            return self._active_planner.plan_call(named, settings, labels, end), None
        if given[0] is not None:
            self._active_planner.check_given(given[0], named, labels)
        return given


def _named(parameters: tuple[str, ...], args: Args, kwargs: Kwargs) -> Kwargs:
    """The arguments of a call by name."""
    return {**dict(zip(parameters, args, strict=False)), **kwargs} if args else kwargs


def _forget_compiled() -> None:
    """Compiled code does not see entrances that come or go later, and whatever calls the model may be compiled."""
    torch.compiler.reset()
