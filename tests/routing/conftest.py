from __future__ import annotations

from collections.abc import Iterator

import models
import pytest
import torch
from models import Tiny

import reroute
from reroute_kernels import PagedPool


@pytest.fixture(params=models.NAMES)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    """Each model adapter in turn."""
    return models.tiny(request.param)


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
