"""What a routed prefill does on the host, in calls of Python functions of the product: unlike times they repeat."""

from __future__ import annotations

from typing import Any

import models
import pytest
from support import frames

import reroute

FOUR = reroute.Schedule((4, 12, 20, 28), (0.5, 0.4, 0.3, 0.25))


@pytest.mark.parametrize(
    ("settings", "most"),
    [({"keep": 1.0}, 300), ({"schedule": FOUR}, 3100)],
    ids=["keep=1", "four decisions"],
)
def test_a_prefill_of_32_layers(settings: dict[str, Any], most: int) -> None:
    """In the second one all that is kept from call to call is there. Statistics are not made unless somebody asks."""
    tiny = models.llava(layers=32)
    given = tiny.inputs([tiny.prompt(3, 5, tiny.grid, 5)])
    with reroute.enable(tiny.model, backend="torch", **settings) as handle:
        tiny.model(**given)
        counts = frames(lambda: tiny.model(**given))
        assert "reroute.stats.make_stats" not in counts
        assert handle.stats().prefills == 2
    assert counts.total() <= most, counts.most_common(20)
