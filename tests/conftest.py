"""Makes ``models``, ``oracle``, ``races``, ``tensors`` and ``two_processes`` importable from every test (this folder is
put on the path), and tests repeatable.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("default", deadline=None, print_blob=True)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.hookimpl(tryfirst=True)  # before those with a mark are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow is what repeats on a further model what two others show: of LLaVA as many key heads as query heads, where
    Qwen has fewer.
    """
    for item in items:
        if "llava-mha" in item.name.partition("[")[2]:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A ``races.Gpu`` that watches the test."""
    from races import Gpu

    gpu = Gpu()
    gpu.install(monkeypatch)
    with gpu.watching():
        yield gpu


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """No compiled code goes from one test to the next, and inference is what is compiled."""
    import torch
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch.compiler.reset()
