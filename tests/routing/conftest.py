from __future__ import annotations

import sys
from collections.abc import Iterator

import models
import pytest
import torch
from models import Tiny
from support import FAMILIES, small
from tape import Tape
from tape_recorder import record_on_tapes

import reroute
from reroute_kernels import PagedPool


@pytest.fixture(params=models.NAMES)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    """Each model adapter in turn."""
    return models.tiny(request.param)


@pytest.fixture(params=FAMILIES)
def few(request: pytest.FixtureRequest) -> Tiny:
    """A model of five layers of each family."""
    return small(request.param)


@pytest.fixture(params=FAMILIES)
def own(request: pytest.FixtureRequest) -> Tiny:
    """As ``few``, and the test may change it."""
    return models.llava(layers=5) if request.param == "llava" else models.qwen(layers=5)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Graphs are made on the CPU: tapes, which are listed as they are recorded."""
    return record_on_tapes(monkeypatch)


@pytest.fixture
def _hasty() -> Iterator[None]:
    """Threads change places as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    """After every test, whatever it did: routing is off, and no pool row is leased."""
    pool = PagedPool.shared(64, torch.float32, "cpu")
    yield
    reroute.disable()
    for model in (models.tiny(name).model for name in models.NAMES):
        if hasattr(model.model, "rope_deltas"):
            model.model.rope_deltas = None  # Transformers keeps the last prompt's
    assert pool.stats().leases == 0
