from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tape import Tape
from tape_recorder import record_on_tapes

import reroute
from reroute.transformers import router
from reroute.transformers.graphs import why_not_prompt


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Graphs are made on the CPU: tapes, which are listed as they are recorded."""
    return record_on_tapes(monkeypatch)


@pytest.fixture
def _without_gradients() -> Iterator[None]:
    """None are recorded, and after the test no model is routed."""
    with torch.no_grad():
        yield
    reroute.disable()


@pytest.fixture
def _planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types without towers here have plans that are made ahead; that is no reason to run eagerly meanwhile."""
    monkeypatch.setattr(router, "why_not_prompt", lambda *args, is_given: why_not_prompt(*args, is_given=False))
