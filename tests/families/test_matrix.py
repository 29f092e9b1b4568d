"""Every type with every feature: right by the oracle, or refused with a sentence. ``MATRIX=all`` runs all of them."""

from __future__ import annotations

import os
from typing import Final

import pytest
import torch
from features import FEATURES
from models import TRANSFORMERS
from test_types import LATER
from tiny_types import RECURRENT, SLIDING, TYPES

from reroute.errors import RerouteError
from reroute.transformers import ROUTED

KINDS = [kind for kind in ROUTED if kind in TYPES and (kind not in LATER or TRANSFORMERS >= (5, 24))]
WINDOWS = (*SLIDING, "lfm3_vl")
DELTA = tuple(kind for kind in RECURRENT if kind not in ("lfm2_vl", "lfm3_vl"))
"""States that do not go back; rows of a convolution do."""
OF_TWO_WAYS = ("paligemma",)
"""A whole prompt sees itself both ways, so that parts of a text say something else than the text, in the plain model
too; and its flash attention is causal."""

REFUSED: Final[dict[str, tuple[tuple[str, ...], str]]] = {
    "flash": (WINDOWS, "counts the window of layers"),
    "static cache": (("unlimited_ocr",), "that may differ in length"),
    "offloaded static cache": (("unlimited_ocr",), "that may differ in length"),
    "quantized cache": (RECURRENT, "that may differ in length"),
    "later turns": (("unlimited_ocr",), "see a window of all that comes after the first prompt"),
    "tokens taken back": (DELTA, "they do not go back"),
    "turns that choose again": ((*SLIDING, *RECURRENT, "ernie4_5_vl_moe"), "reopens=True is not built for layers"),
}
"""For which types a feature is refused, and what the sentence says."""
NOT_THERE: Final[dict[str, tuple[str, ...]]] = {
    **dict.fromkeys(("flash", "outputs", "tokens taken back", "turns that choose again"), OF_TWO_WAYS),
    "embeddings": ("chameleon", "kosmos-2.5"),  # whose decoders make them
    "offloaded static cache": ("idefics2",),  # Transformers looks for a layer that does not slide
}
"""For which types the plain model has no such feature, or it means something else."""
SAMPLE: Final = 2
"""Features of each type that run before a merge; neighbours run others."""


def _cells() -> list[tuple[str, str]]:
    features, everything = list(FEATURES), os.environ.get("MATRIX") == "all"
    cells = []
    for row, kind in enumerate(KINDS):
        chosen = features if everything else [features[(SAMPLE * row + i) % len(features)] for i in range(SAMPLE)]
        cells += [(kind, name) for name in chosen if kind not in NOT_THERE.get(name, ())]
    return cells


@torch.no_grad()
@pytest.mark.parametrize(("kind", "feature"), _cells())
def test_a_feature_of_a_type(kind: str, feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if feature == "tokens taken back" and kind in WINDOWS and TRANSFORMERS < (5, 24):
        pytest.skip("in this release plain windows that record what they drop give more rows than their masks have")
    kinds, sentence = REFUSED.get(feature, ((), ""))
    if kind not in kinds:
        FEATURES[feature](kind, monkeypatch)
        return
    with pytest.raises(RerouteError, match=sentence):
        FEATURES[feature](kind, monkeypatch)
