"""What published selections keep of given tensors, by their authors' code."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from reroute.methods import DivPrune
from reroute.rankers.max_min_distance import max_min_picks

HERE = Path(__file__).parent


def case(name: str) -> dict[str, Tensor]:
    return load_file(HERE / name / "case.safetensors")


def test_divprune() -> None:
    given = case("method_divprune")
    picks = max_min_picks(given["in.tokens"], 10)
    assert torch.equal(picks, given["out.order"])
    assert torch.equal(picks.sort().values, given["out.kept"])
    assert DivPrune(ratios=(0.25,)).schedule(32, "remove").counts(40) == (10,)
    assert DivPrune().schedule(32, "remove").counts(576) == (56,)


def test_divprune_on_a_circle() -> None:
    angles = [math.radians(degrees) for degrees in (0, 10, 50, 100, 115, 170)]
    points = torch.tensor([[math.cos(angle), math.sin(angle)] for angle in angles])
    assert max_min_picks(points, 3).tolist() == [5, 0, 3]


@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 0), (4, 4), (4, 3)])
def test_equal_tokens_are_picked_once_each(n: int, k: int) -> None:
    """The original repeats an index there."""
    assert max_min_picks(torch.ones(n, 8), k).tolist() == list(range(k))
