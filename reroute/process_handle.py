"""The handle of ``reroute.enable`` without a model: routing of every supported model of the process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from .config import RoutingConfig
from .errors import RerouteError

__all__ = ["ProcessHandle"]


class ProcessHandle:
    """Routing of every supported model of this process, as ``reroute.enable`` without a model returns it.

    Also a context manager, which disables at its end. ``reroute.handle_of`` gives the handle of each model once it has
    been called.

    - ``config``: the settings.
    """

    def __init__(
        self,
        config: RoutingConfig,
        lock: AbstractContextManager[Any],
        is_enabled: Callable[[], bool],
        stop: Callable[[], None],
    ) -> None:
        """Use ``reroute.enable``. ``lock``: held while routing changes; ``stop`` disables if ``is_enabled()``."""
        self.config = config
        self._lock, self._is_enabled, self._stop, self._blocks = lock, is_enabled, stop, 0

    def __repr__(self) -> str:
        """What it does, for who looks at it in a notebook."""
        return f"<ProcessHandle: {self.config.in_words}, {'enabled' if self.is_enabled else 'disabled'}>"

    @property
    def is_enabled(self) -> bool:
        """Whether models that are called now are routed by it; it ends as all models are enabled again."""
        return self._is_enabled()

    def disable(self) -> None:
        """Restore all models that it routes, exactly; those that were enabled by themselves stay routed. Idempotent.

        Raises:
            RerouteError: a call of one of these models runs, in whatever thread; nothing is changed then.
        """
        self._stop()

    def __enter__(self) -> ProcessHandle:
        """Routing is on since ``enable``, and stays so until the block ends.

        Raises:
            RerouteError: it was disabled or replaced meanwhile.
        """
        with self._lock:
            if not self.is_enabled:
                raise RerouteError(
                    "Routing of all models was disabled or replaced. Call reroute.enable for a new handle."
                )
            self._blocks += 1
            return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disable."""
        with self._lock:
            self._blocks -= 1
            self.disable()

    def _check_replaced(self) -> None:
        """Check that all may be enabled anew. RerouteError in a block: what follows in it would not be routed."""
        if self._blocks and self.is_enabled:
            raise RerouteError(
                "All models are routed in a with block that has not ended. Enable single models in it, or use "
                "handle.at(…) of their handles to give calls other settings."
            )
