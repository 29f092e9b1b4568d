"""Tapes in place of CUDA graphs: prefills are replayed on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakValueDictionary

import pytest
from tape import Tape

from reroute.graphs import RECORDERS, TILE, Arena

__all__ = ["TapeRecorder", "record_on_tapes"]


class TapeRecorder:
    """See ``reroute.graphs.Recorder``. ``tapes``: all that were recorded by anyone, in their order."""

    tapes: list[Tape]

    def __init__(self, tapes: list[Tape]) -> None:
        self.tapes = tapes

    def rehearse(self, run: Callable[[], None]) -> None:
        run()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        tape = Tape()
        with tape:
            run()
        self.tapes.append(tape)
        return tape.replay

    def give_back(self) -> None:
        pass

    @property
    def nbytes(self) -> int:
        return 0


def record_on_tapes(monkeypatch: pytest.MonkeyPatch, least: int = TILE) -> list[Tape]:
    """From now on graphs are made on the CPU; the list fills with what is recorded.

    Classes count by ``least`` rows at least: by whole tiles, short prompts of all lengths share one.
    """
    tapes: list[Tape] = []
    monkeypatch.setattr("reroute.graphs.shape_class.LEAST", least)
    monkeypatch.setitem(RECORDERS, "cpu", lambda device: TapeRecorder(tapes))
    monkeypatch.setattr(Arena, "_shared", WeakValueDictionary())  # one of a test that failed may live
    return tapes
