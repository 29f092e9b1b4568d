"""How much room static layers get."""

from __future__ import annotations

import random
from typing import Any

import pytest
from transformers.cache_utils import StaticLayer

from reroute.methods import PDrop
from reroute.transformers.cache.static import room_for


def layer_of(longest: int) -> Any:
    return StaticLayer(max_cache_len=longest)


@pytest.mark.parametrize("longest", [1, 7, 64, 100, 4096, 4352])
def test_room_is_enough_and_no_more_than_an_eighth_too_much(longest: int) -> None:
    sizes, layer = set(), layer_of(longest)
    for lacks in range(longest):
        room = room_for(layer, lacks)
        assert longest - lacks <= room <= longest
        assert room - (longest - lacks) < max(8, -(-longest // 8) + 8)
        assert room % 8 == 0 or room == longest
        sizes.add(room)
    assert len(sizes) <= 8


def test_pictures_of_many_sizes() -> None:
    """The figures of the guide to CUDA graphs."""
    draw = random.Random(0)
    schedule = PDrop().with_budget(1 / 3, 28, "route").schedule(28, "route")
    needed, given, layer = [], [], layer_of(4352)
    for _ in range(500):
        visual = min(draw.randint(8, 32) * 2 * draw.randint(8, 32) * 2, 4096)
        lacks = [visual - k for k in schedule.counts(visual)]
        needed.append(tuple(4352 - count for count in lacks))
        given.append(tuple(room_for(layer, count) for count in lacks))
    assert (len(set(needed)), len(set(given))) == (210, 16)
    more = [sum(mine) / sum(least) - 1 for mine, least in zip(given, needed, strict=True)]
    assert sum(more) / len(more) == pytest.approx(0.09, abs=0.005)
