"""Features of pictures that a decoder adds between its layers, as states of all rows in a graph."""

from __future__ import annotations

import torch

from reroute.transformers.adapters import FeatureForm, Features
from reroute.transformers.graphs.added import AddedStates

FORM = FeatureForm("features", (0,), is_mapping=False, mask="mask", more=())


def test_what_lacks_features_keeps_its_bits() -> None:
    """Also -0.0, of which the sum with 0.0 is 0.0."""
    added, hidden = AddedStates((1,)), torch.tensor([[[-0.0, 0.0], [1.0, -0.0]]])
    ((shape, dtype),) = added.layout((1, 2, 2), torch.float32)
    added.place_in([torch.empty(shape, dtype=dtype)])
    features = Features(FORM, (torch.ones(1, 2),), torch.tensor([[False, True]]))
    added.fill(features, torch.arange(2))
    assert added.add(1, hidden).flatten().tolist() == [-0.0, 0.0, 2.0, 1.0]
    assert added.add(1, hidden).signbit().flatten().tolist() == [True, False, False, False]
