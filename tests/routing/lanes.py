"""Threads that can be stopped in the midst of a call, so that calls overlap in a way that is the same each time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from torch import nn

__all__ = ["Frame", "Happening", "Interrupt", "Lane"]

PATIENCE = 120.0
"""Seconds after which a thread that does not answer hangs."""


class Interrupt(BaseException):
    """As KeyboardInterrupt: nothing on the way may take it for an error of its own."""


class Lane:
    """A thread that works on one thing at a time. Only one of all lanes and the test itself runs at any moment."""

    def __init__(self, name: str) -> None:
        self.name, self.is_paused = name, False
        self.frames: list[Frame] = []
        self._orders: SimpleQueue[Any] = SimpleQueue()
        self._news: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def ident(self) -> int | None:
        """Of its thread."""
        return self._thread.ident

    def do(self, work: Callable[[], Any]) -> None:
        """Let it work until it has ended or pauses. What it raises is raised here."""
        assert not self.is_paused
        self._orders.put(work)
        self._wait()

    def go_on(self) -> None:
        """Let it work again, after a pause."""
        assert self.is_paused
        self._orders.put(None)
        self._wait()

    def pause(self) -> None:
        """Called by its own work: let others work."""
        self._news.put((True, None))
        self._orders.get()

    def close(self) -> None:
        """End the thread."""
        self._orders.put(Interrupt)
        self._thread.join(PATIENCE)

    def _wait(self) -> None:
        self.is_paused, error = self._news.get(timeout=PATIENCE)
        if error is not None:
            raise error

    def _run(self) -> None:
        while (work := self._orders.get()) is not Interrupt:
            error = None
            try:
                work()
            except BaseException as raised:
                error = raised
            self._news.put((False, error))
            del work, error


@dataclass(frozen=True)
class Happening:
    """What happens when ``module`` is called for the ``nth`` time in a call, or each time.

    It happens before the module runs, or ``after``.
    """

    module: nn.Module
    act: Callable[[], Any]
    nth: int | None = 0
    after: bool = False


@dataclass
class Frame:
    """One call in a lane. Calls inside of it have frames of their own."""

    lane: Lane
    counts: dict[int, int] = field(default_factory=dict)

    @contextmanager
    def watching(self, happenings: Sequence[Happening]) -> Iterator[None]:
        """Let ``happenings`` happen inside of the block, which is the call."""
        with ExitStack() as hooks:
            for number, one in enumerate(happenings):
                register = one.module.register_forward_hook if one.after else one.module.register_forward_pre_hook
                hooks.callback(register(self._hook(number, one)).remove)
            self.lane.frames.append(self)
            try:
                yield
            finally:
                assert self.lane.frames.pop() is self

    def _hook(self, number: int, one: Happening) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if threading.get_ident() != self.lane.ident or not self.lane.frames or self.lane.frames[-1] is not self:
                return  # of another call: of another thread, or inside of this one
            count = self.counts.get(number, 0)
            self.counts[number] = count + 1
            if one.nth in (None, count):
                one.act()

        return hook
