"""What is true at a moment: models and what routes them, blocks of threads, conversations.

It is worked out from what was asked of the product, never from its answers; and every change is asked of both.
"""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from conversations import Conversation
from lanes import Lane
from models import Tiny
from oracle import Rules
from support import snapshot
from world_settings import REFUSALS, Settings, changed, rules_of

import reroute
from reroute.errors import RerouteError
from reroute.transformers.interception import Intercepted, role_of
from reroute_kernels import PagedPool

__all__ = ["Block", "Plans", "Running", "Subject", "World"]

MET = "_reroute_met"
"""Of models that were called while all are enabled, from then on until none are."""


@dataclass(frozen=True)
class Plans:
    """A plan made ahead. ``shape``: of the calls that may use it; ``rules``: None if it routes nothing."""

    plan: Any = None
    shape: tuple[Any, ...] = ()
    rules: Rules | None = None
    queries: tuple[int | None, ...] = ()
    knows_labels: bool = False


@dataclass
class Block:
    """A ``with`` block of a lane. ``kind``: handle, at, using; ``value``: settings or plans."""

    kind: str
    subject: Subject
    handle: Any
    manager: Any
    value: Any = None


@dataclass(eq=False)
class Subject:
    """A model. ``settings``: those of its handle. ``awaits``: its first call is on its way to give it one.

    ``is_told``: whether we listen to the handle. ``is_common``: it came with the settings of all models.
    """

    tiny: Tiny
    settings: Settings = field(default_factory=dict)
    attached: Any = None
    awaits: bool = False
    is_told: bool = False
    is_common: bool = False

    def __post_init__(self) -> None:
        model = self.tiny.model
        self.before, self.classes = self._attributes(), [type(module) for module in model.modules()]
        self.tensors = [(t, t.clone(), t._version) for t in (*model.parameters(), *model.buffers())]

    @property
    def is_enabled(self) -> bool:
        return self.awaits or self.attached is not None

    @property
    def handle(self) -> Any:
        if self.awaits and (found := reroute.handle_of(self.tiny.model)) is not None:
            self.attached, self.awaits = found, False
        return self.attached

    def _attributes(self) -> Any:
        """But for the mark of models that were called while all are enabled: copies keep that of another one."""
        attributes = snapshot(self.tiny.model)
        attributes[""].pop(MET, None)
        return attributes

    def check_plain(self) -> None:
        """Nothing is left of a handle."""
        model = self.tiny.model
        assert [type(module) for module in model.modules()] == self.classes
        assert self._attributes() == self.before
        assert reroute.handle_of(model) is None
        assert all(t._version == version and torch.equal(t, kept) for t, kept, version in self.tensors)


@dataclass(eq=False)
class Running:
    """A call that has begun. ``place``: where it pauses. ``is_plain``: routing was off when it began, or not meant."""

    lane: Lane
    subject: Subject
    is_generation: bool
    is_plain: bool
    place: str | None = None

    @property
    def handle(self) -> Any:
        return None if self.is_plain else self.subject.handle


class World:
    """``lanes`` work on it one at a time. ``everywhere``: settings for models without own ones, and who was called."""

    def __init__(self, tiny: Tiny, family: str) -> None:
        self.family = family
        self.lanes = [Lane("A"), Lane("B")]
        self.subjects = [Subject(tiny)]
        self.conversations: list[Conversation] = []
        self.blocks: dict[Lane, list[Block]] = {lane: [] for lane in self.lanes}
        self.running: list[Running] = []
        self.old_handles: list[Any] = []
        self.everywhere: tuple[Settings, list[Subject]] | None = None
        self.recorded: Counter[tuple[int, int | None]] = Counter()  # by handle and thread
        self.told: Counter[tuple[int, int | None]] = Counter()
        self.outcomes: Counter[str] = Counter()  # how often what happened, for a look at what a run has covered
        self.pool = PagedPool.shared(64, torch.float32, "cpu")
        self.leases_before = self.pool.stats().leases

    # --- what is so -----------------------------------------------------------------------------------------------

    @property
    def leases(self) -> int:
        return self.pool.stats().leases - self.leases_before

    def subject(self, number: int) -> Subject:
        return self.subjects[number % len(self.subjects)]

    def conversation(self, number: int) -> Conversation | None:
        """One that no call goes on with."""
        idle = [one for one in self.conversations if not one.is_busy]
        return idle[number % len(idle)] if idle else None

    def add(self, conversation: Conversation) -> None:
        """The oldest ones are forgotten."""
        idle = [one for one in self.conversations if not one.is_busy]
        if len(idle) > 3:
            self.conversations.remove(idle[0])
        self.conversations.append(conversation)

    def runs(self, handle: Any) -> bool:
        return handle is not None and any(one.handle is handle for one in self.running)

    def blocks_of(self, handle: Any, *kinds: str) -> list[Block]:
        return [b for blocks in self.blocks.values() for b in blocks if b.handle is handle and b.kind in kinds]

    def innermost(self, lane: Lane, subject: Subject, kind: str) -> Any:
        here = (b.value for b in reversed(self.blocks[lane]) if b.kind == kind and b.handle is subject.handle)
        return next(here, None) if subject.handle is not None else None

    def settings(self, lane: Lane, subject: Subject) -> Settings:
        """Of calls in ``lane``."""
        return self.innermost(lane, subject, "at") or subject.settings

    def can_begin(self, subject: Subject) -> bool:
        """Whether calls that began plain stay plain if routing begins now: they are in the midst of the layers."""
        plain = [one for one in self.running if one.subject is subject and one.is_plain]
        early = ("the model", "the base model", "the vision tower", "the embeddings", "the decoder", None)
        return all(len(one.lane.frames) == 1 and not one.is_generation and one.place not in early for one in plain)

    @contextmanager
    def keeping_deltas(self) -> Iterator[None]:
        """Transformers keeps on the model what it needs of Qwen's last prompt in the next call: that of a call inside
        must not count.
        """
        bases = [subject.tiny.model.model for subject in self.subjects]
        kept = [(base, base.rope_deltas) for base in bases if hasattr(base, "rope_deltas")]
        try:
            yield
        finally:
            for base, deltas in kept:
                base.rope_deltas = deltas

    @contextmanager
    def refused(self, *reasons: str) -> Iterator[None]:
        """What is asked for inside is refused for one of ``reasons``, if there are any, and else is done."""
        if not reasons:
            yield
            return
        self.outcomes["refused: " + " or ".join(reasons)] += 1
        pattern = "|".join(f"(?:{REFUSALS[reason]})" for reason in reasons)
        with pytest.raises(RerouteError, match=pattern):
            yield

    # --- routing on and off ---------------------------------------------------------------------------------------

    def enable(self, subject: Subject, settings: Settings) -> Any:
        """The handle; None if it was refused."""
        old = subject.handle
        reasons = {
            "settings": rules_of(settings, self.family) is None,
            "busy": self.runs(old),
            "in a block": old is not None and bool(self.blocks_of(old, "handle", "at", "using")),
        }
        wrong = [reason for reason, holds in reasons.items() if holds]
        handle = None
        with self.refused(*wrong):
            handle = reroute.enable(subject.tiny.model, **settings)
        if handle is None:
            assert old is None or old.is_enabled
            return None
        self._has_ended(subject)
        subject.attached, subject.settings, subject.is_told, subject.is_common = handle, settings, True, False
        handle.on_prefill(partial(self._tell, id(handle)))
        return handle

    def disable(self, subject: Subject, *, by_handle: bool = False) -> None:
        handle = subject.handle
        with self.refused(*["busy"] * self.runs(handle)):
            if by_handle and handle is not None:
                handle.disable()
            else:
                reroute.disable(subject.tiny.model)
        if not self.runs(handle):
            self._has_ended(subject)

    def enable_everywhere(self, settings: Settings) -> None:
        common = [subject for subject in self.subjects if subject.is_common]
        reasons = {
            "settings": settings.get("keep") == 0,  # others depend on the model
            "busy": any(self.runs(subject.handle) for subject in common),
        }
        wrong = [reason for reason, holds in reasons.items() if holds]
        with self.refused(*wrong):
            reroute.enable(**settings)
        if not wrong:
            self.everywhere = settings, []
            for subject in common:
                self._has_ended(subject)

    def disable_everywhere(self) -> None:
        is_busy = any(self.runs(subject.handle) for subject in self.subjects)
        with self.refused(*["busy"] * is_busy):
            reroute.disable()
        if not is_busy:
            self.everywhere = None
            assert MET not in vars(self.subjects[0].tiny.model)
            for subject in self.subjects:
                self._has_ended(subject)

    def meet(self, subject: Subject) -> bool:
        """``subject`` is called under ``enable()``: whether it goes on as it should, which it does but for one case."""
        if self.everywhere is None or subject.is_enabled or subject in self.everywhere[1]:
            return True
        settings, seen = self.everywhere
        if rules_of(settings, self.family) is not None:
            if not self.can_begin(subject):
                return False
            subject.awaits, subject.settings, subject.is_told, subject.is_common = True, settings, False, True
        seen.append(subject)
        return True

    def _has_ended(self, subject: Subject) -> None:
        if subject.attached is not None:
            assert not subject.attached.is_enabled
            self.old_handles = [*self.old_handles[-1:], subject.attached]
            self._forget(subject.attached)
        subject.attached, subject.is_common = None, False

    def _forget(self, handle: Any) -> None:
        """Its id may be that of another one soon."""
        for counts in (self.recorded, self.told):
            for key in [key for key in counts if key[0] == id(handle)]:
                del counts[key]

    def _tell(self, handle: int, _: Any) -> None:
        self.told[handle, threading.get_ident()] += 1

    # --- blocks ---------------------------------------------------------------------------------------------------

    def open(self, lane: Lane, block: Block) -> None:
        block.manager.__enter__()
        self.blocks[lane].append(block)

    def open_at(self, lane: Lane, subject: Subject, given: Settings) -> bool:
        """Whether the block was opened."""
        settings = changed(subject.settings, given)
        is_wrong = rules_of(settings, self.family) is None
        with self.refused(*["settings"] * is_wrong):
            manager = subject.handle.at(**given)
            self.open(lane, Block("at", subject, subject.handle, manager, settings))
        return not is_wrong

    def close_block(self, lane: Lane) -> None:
        block = self.blocks[lane].pop()
        ends = block.kind == "handle" and block.subject.handle is block.handle
        is_busy = ends and self.runs(block.handle)
        with self.refused(*["busy"] * is_busy):
            block.manager.__exit__(None, None, None)
        if ends and not is_busy:
            self._has_ended(block.subject)

    # --- models ---------------------------------------------------------------------------------------------------

    def copy_model(self, subject: Subject) -> None:
        model = copy.deepcopy(subject.tiny.model)
        assert not any(isinstance(module, Intercepted) or role_of(module) for module in model.modules())
        self.subjects.append(Subject(replace(subject.tiny, model=model)))

    def drop_model(self) -> None:
        """Of a copy nothing stays, whether it is routed or not."""
        subject = self.subjects.pop()
        self._forget(subject.handle)
        self.old_handles = []
        gone = weakref.ref(subject.tiny.model)
        if self.everywhere is not None and subject in self.everywhere[1]:
            self.everywhere[1].remove(subject)
        del subject
        gc.collect()
        assert gone() is None

    # --- what must always be so -----------------------------------------------------------------------------------

    def check_old_handles(self) -> None:
        """They do nothing more, and say so."""
        for handle in self.old_handles:
            handle.disable()
            for use in (partial(handle.at, keep=0.5), partial(handle.using, None), handle.__enter__):
                with pytest.raises(RerouteError, match="Routing of this model was disabled"):
                    use()

    def check(self) -> None:
        paused = sum(len(lane.frames) for lane in self.lanes)
        blocks = [block for blocks in self.blocks.values() for block in blocks]
        plans = sum(block.kind == "using" and block.value.rules is not None for block in blocks)
        assert self.leases <= plans + paused
        for subject in self.subjects:
            if subject.handle is not None:
                self._check_routed(subject)
            elif not any(one.subject is subject for one in self.running):
                subject.check_plain()
        if not self.running:
            assert not any(handle._router._running for handle in self.old_handles)

    def _check_routed(self, subject: Subject) -> None:
        handle = subject.handle
        found: Any = reroute.handle_of(subject.tiny.model)
        assert found is handle
        assert handle.is_enabled
        if self.runs(handle):
            return
        assert not handle._router._running
        assert handle._router._scopes._open == len(self.blocks_of(handle, "at", "using"))
        of_handle = {key: n for key, n in self.recorded.items() if key[0] == id(handle) and n}
        counts = handle.totals().prefills, handle.stats().prefills, sum(of_handle.values())
        assert len(set(counts)) == 1, f"prefills in totals, in stats, and recorded: {counts}"
        told = {key: n for key, n in self.told.items() if key[0] == id(handle)}
        assert told == (of_handle if subject.is_told else {})
