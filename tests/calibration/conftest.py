from __future__ import annotations

from typing import Any

import pytest
from models import Tiny, llava, qwen
from torch import Tensor

Inputs = dict[str, Tensor]


@pytest.fixture(scope="module", params=["llava", "qwen"])
def few(request: pytest.FixtureRequest) -> Tiny:
    """A model of its own, whose generation ends at a token that it does say now and then."""
    made = {"llava": llava, "qwen": qwen}[request.param]()
    made.model.generation_config.update(eos_token_id=[7, 11, 19, 23, 42, 77])
    return made


@pytest.fixture(scope="module")
def prompts(few: Tiny) -> list[Inputs]:
    """Twelve prompts of one picture each, of several lengths."""
    return [few.inputs([few.prompt(seed, 2 + seed % 3, few.grid, 3 + seed % 4)]) for seed in range(12)]


@pytest.fixture
def space() -> Any:
    """The proposals for 12 layers at a ninth of 144 tokens."""
    from reroute.calibration.proposal import Space

    return Space(1 / 9, 12, "route", (144,))
