"""Types of which some layers keep a state, against the dense oracle: batches, long answers, and later turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense import near, predict
from test_types import ONE, TWO, batch
from test_windows import TOKENS, decode
from tiny_types import RECURRENT, TYPES, build

import reroute

LAYERS = (2, 6)
WAYS = [("route", "sdpa"), ("route", "eager"), ("remove", "sdpa"), ("remove", "eager")]
ALIKE = ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7")
"""Types whose decoder is Qwen3.5's."""
SAMPLES = ("qwen3_5", "lfm2_vl")
CASES = [
    pytest.param(kind, *way, marks=[pytest.mark.slow] * (kind in ALIKE or (kind not in SAMPLES and way != WAYS[0])))
    for kind in RECURRENT
    if kind in TYPES
    for way in WAYS
]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "action", "attention"), CASES)
def test_a_recurrent_type_against_the_oracle(kind: str, action: Any, attention: str) -> None:
    dense, tiny = build(kind, layers=8), build(kind, attention, layers=8)
    ratios = (0.4, 0.7) if action == "route" else (0.7, 0.4)
    expected = [predict(dense, [*ids, *TOKENS], LAYERS, ratios, prompt=len(ids), action=action) for ids in (ONE, TWO)]
    plain = tiny.model(**batch(tiny, ONE, TWO), use_cache=False).logits
    with reroute.enable(tiny.model, schedule=reroute.Schedule(LAYERS, ratios), action=action, trace=True) as handle:
        for samples, wanted in (([ONE], expected[:1]), ([ONE, TWO], expected)):
            logits, after, _ = decode(handle, tiny, *samples)
            for b, (ids, one) in enumerate(zip(samples, wanted, strict=True)):
                assert one.margin > 1e-6
                assert [stage.kept[b].tolist() for stage in handle.trace] == one.kept
                near(logits[b, -len(ids) :], one.logits[: len(ids)])
                near(after[:, b], one.logits[len(ids) :])
        with handle.at(keep=1.0):
            assert torch.equal(tiny.model(**batch(tiny, ONE, TWO), use_cache=False).logits, plain)
    assert torch.equal(tiny.model(**batch(tiny, ONE, TWO), use_cache=False).logits, plain)
