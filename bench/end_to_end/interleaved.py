"""Wall clock and CPU time: interleaved rounds of two variants, and seconds by part of the program."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["Parts", "Rounds", "Spread", "interleaved"]


@dataclass(frozen=True)
class Spread:
    """Median and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least two values."""
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        return cls(statistics.median(values), fifths[0], fifths[3])


@dataclass(frozen=True)
class Rounds:
    """Seconds of two variants in alternation: wall clock, and CPU time of all threads of the process."""

    plain: list[float]
    routed: list[float]
    plain_cpu: list[float]
    routed_cpu: list[float]

    @property
    def ratio(self) -> Spread:
        """Routed over plain, round by round."""
        return Spread.of([r / p for r, p in zip(self.routed, self.plain, strict=True)])

    @property
    def cpu_ratio(self) -> Spread:
        """The same in CPU time, which other work on the machine hardly changes."""
        return Spread.of([r / p for r, p in zip(self.routed_cpu, self.plain_cpu, strict=True)])


def interleaved(plain: Callable[[], Any], routed: Callable[[], Any], rounds: int, warmup: int = 2) -> Rounds:
    """Run plain, routed, plain, routed…, so that slow drifts of the machine hit both alike."""
    for _ in range(warmup):
        plain(), routed()
    samples = []
    with _no_garbage_collection():
        for _ in range(rounds):
            samples.append((*_timed(plain), *_timed(routed)))
    plain_wall, plain_cpu, routed_wall, routed_cpu = map(list, zip(*samples, strict=True))
    return Rounds(plain_wall, routed_wall, plain_cpu, routed_cpu)


def _timed(function: Callable[[], Any]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Parts:
    """Time by part of the program: wall clock and CPU time. A part does not count the parts that run inside it."""

    def __init__(self, outer: str, undivided: Sequence[str] = ()) -> None:
        """``outer``: all other parts count inside it only. ``undivided``: parts that do count what runs inside them."""
        self.wall: defaultdict[str, float] = defaultdict(float)
        self.cpu: defaultdict[str, float] = defaultdict(float)
        self._outer, self._undivided = outer, frozenset(undivided)
        self._stack: list[str] = []
        self._last = 0.0, 0.0

    def wrap(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """``function``, with its time charged to ``part``."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self._stack and part != self._outer:
                return function(*args, **kwargs)
            self._charge()
            undivided = self._stack and self._stack[-1] in self._undivided
            self._stack.append(self._stack[-1] if undivided else part)
            try:
                return function(*args, **kwargs)
            finally:
                self._charge()
                self._stack.pop()

        return timed

    def _charge(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        if self._stack:
            self.wall[self._stack[-1]] += wall - self._last[0]
            self.cpu[self._stack[-1]] += cpu - self._last[1]
        self._last = wall, cpu
