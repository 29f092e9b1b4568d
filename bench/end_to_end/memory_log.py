"""Which tensors are alive when: an exact count of the bytes that a program holds."""

from __future__ import annotations

import functools
import math
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Allocation", "LiveBytes", "Span"]


@dataclass(eq=False)
class Allocation:
    """One storage. ``born`` and ``died`` are ticks; a tick is an allocation or a release.

    ``owner`` is the first of the watched packages on the stack when it was made, "" if none was, ``where`` the
    innermost function of the owner (else of Transformers), ``op`` the operation that made it.
    """

    bytes: int
    op: str
    owner: str
    where: str
    born: int
    died: float = math.inf


@dataclass
class Span:
    """A named piece of the program ran after tick ``start`` and up to tick ``end``."""

    start: int
    end: int

    def contains(self, tick: int) -> bool:
        """Whether ``tick`` happened while it ran."""
        return self.start < tick <= self.end


class LiveBytes(TorchDispatchMode):
    """Logs every storage that comes to be in ``with``, and when it goes.

    Storages are seen as tensors that operations return: scratch that lives inside one ATen kernel is not seen.
    """

    def __init__(self, watched: Sequence[str] = (), around: Sequence[str] = ()) -> None:
        """``watched``: packages whose allocations are told apart, but for modules that lie ``around`` other code."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.log: list[Allocation] = []
        self.spans: dict[str, list[Span]] = {}
        self._watched, self._around = frozenset(watched), frozenset(around)
        self._known: dict[weakref.ref[Any], Allocation] = {}
        self._now = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run ``func``, then log what is new."""
        out = func(*args, **(kwargs or {}))
        # What shares memory with an argument (a view, say of a parameter) is not new.
        old = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if id(storage) not in old and weakref.ref(storage) not in self._known:
                self._born(storage, str(func))
        return out

    def spanned(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, which now notes in ``spans[name]`` when it runs."""

        @functools.wraps(function)
        def noted(*args: Any, **kwargs: Any) -> Any:
            span = Span(self._now, self._now)
            self.spans.setdefault(name, []).append(span)
            try:
                return function(*args, **kwargs)
            finally:
                span.end = self._now

        return noted

    def timeline(self, wanted: Callable[[Allocation], bool] = lambda _: True) -> list[int]:
        """Live bytes of the wanted allocations after each tick."""
        changes = [0] * (self._now + 1)
        for allocation in filter(wanted, self.log):
            changes[allocation.born] += allocation.bytes
            if allocation.died <= self._now:
                changes[int(allocation.died)] -= allocation.bytes
        live, total = [], 0
        for change in changes:
            total += change
            live.append(total)
        return live

    def at(self, tick: int) -> Allocation:
        """The allocation that ``tick`` is."""
        return next(a for a in self.log if a.born == tick)

    def alive(self, tick: int) -> list[Allocation]:
        """What is live after ``tick``, the largest first."""
        return sorted((a for a in self.log if a.born <= tick < a.died), key=lambda a: -a.bytes)

    def _born(self, storage: torch.UntypedStorage, op: str) -> None:
        self._now += 1
        owner, where = self._origin(sys._getframe(2))
        allocation = Allocation(storage.nbytes(), op, owner, where, self._now)
        self.log.append(allocation)

        def died(reference: weakref.ref[Any]) -> None:
            self._now += 1
            self._known.pop(reference).died = self._now

        self._known[weakref.ref(storage, died)] = allocation

    def _origin(self, frame: FrameType | None) -> tuple[str, str]:
        fallback = ""
        while frame is not None:
            module = frame.f_globals.get("__name__", "")
            package, code = module.partition(".")[0], frame.f_code
            where = f"{module.rpartition('.')[2]}.{getattr(code, 'co_qualname', code.co_name)}"
            if package in self._watched and module not in self._around:
                return package, where
            if package == "transformers":
                fallback = fallback or where
            frame = frame.f_back
        return "", fallback


def _storages(values: Any) -> Iterable[torch.UntypedStorage]:
    return (value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor))
