from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reroute.rankers import Deviation, Norm, RankInputs
from reroute.rankers.baselines import _steps


@pytest.mark.parametrize(("n", "k", "kept"), [(3, 1, [1]), (10, 3, [1, 4, 8]), (6, 3, [0, 2, 4]), (4, 4, [0, 1, 2, 3])])
def test_evenly_spaced(n: int, k: int, kept: list[int]) -> None:
    assert _steps(n, k, torch.device("cpu")).nonzero().flatten().tolist() == kept


@given(st.integers(0, 600), st.data())
def test_gaps_differ_by_one_at_most(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    kept = _steps(n, k, torch.device("cpu")).nonzero().flatten().tolist()
    gaps = {b - a for a, b in zip(kept, [*kept[1:], kept[0] + n], strict=True)} if kept else {0}
    assert len(kept) == k
    assert max(gaps) - min(gaps) <= 1


def test_norm_and_deviation() -> None:
    hidden = torch.tensor([[3.0, 0.0], [4.0, 0.0], [0.0, 1.0]])
    inputs = RankInputs([hidden], torch.zeros(1, 2), layer=0, stage=0)
    assert Norm().scores(inputs)[0].tolist() == [3.0, 4.0, 1.0]
    close, alike, far = Deviation().scores(inputs)[0].tolist()  # the mean direction is (2/3, 1/3)
    assert close == alike == pytest.approx(2**0.5 / 3)
    assert far == pytest.approx(2 * 2**0.5 / 3)
