"""What ``with`` blocks of a thread, or of an asyncio task, say of the calls inside: their settings, or their plan."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ..config import Settings
from ..core.plan import Plan
from ..core.workspace import Workspace

__all__ = ["Given", "Scopes"]

Given = tuple[Plan | None, Workspace | None]
"""A plan that was made ahead, and the place in the pool that its forwards share."""

_blocks: ContextVar[tuple[tuple[Scopes, Settings | Given], ...]] = ContextVar("reroute_blocks", default=())


class Scopes:
    """The blocks of one model."""

    def __init__(self) -> None:
        """None is open."""
        self._lock, self._open = threading.Lock(), 0

    @property
    def any_open(self) -> bool:
        """Whether any thread is in a block."""
        return self._open > 0

    @property
    def settings(self) -> Settings | None:
        """Those of the innermost block here that has some."""
        return next((value for value in self._here() if isinstance(value, Settings)), None)

    @property
    def given(self) -> Given | None:
        """The plan of the innermost block here that has one."""
        return next((value for value in self._here() if isinstance(value, tuple)), None)

    @contextmanager
    def at(self, settings: Settings) -> Iterator[None]:
        """A block of calls that are routed by ``settings``."""
        with self._block(settings):
            yield

    @contextmanager
    def using(self, plan: Plan | None) -> Iterator[None]:
        """A block of calls that use ``plan``, and one place in the pool; None routes nothing."""
        workspace = None if plan is None else Workspace(plan)
        try:
            with self._block((plan, workspace)):
                yield
        finally:
            if workspace is not None:
                workspace.release()

    @contextmanager
    def _block(self, value: Settings | Given) -> Iterator[None]:
        outer = _blocks.get()
        self._count(1)
        try:
            _blocks.set((*outer, (self, value)))
            yield
        finally:
            _blocks.set(outer)
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._lock:
            self._open += change

    def _here(self) -> Iterator[Any]:
        return (value for owner, value in reversed(_blocks.get()) if owner is self)
