"""Types of which some layers slide, against the dense oracle: windows shorter than prompts, several tokens behind them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense import near, predict
from models import CACHE
from test_types import ONE, TWO, batch, step
from tiny_types import SLIDING, TinyType, build
from torch import Tensor
from transformers import DynamicCache

import reroute

LAYERS = (2, 6)
TOKENS = (7, 11, 13, 17, 19, 23, 29, 31)
"""More than a window."""


def decode(handle: Any, tiny: TinyType, *prompts: list[int]) -> tuple[Tensor, Tensor, Any]:
    """The logits of a prefill, those of ``TOKENS`` after it (T, B, V), and the cache."""
    given = batch(tiny, *prompts)
    cache = DynamicCache(config=tiny.text.config)
    with handle.using(handle.plan(given["input_ids"], given["attention_mask"])):
        logits, after = tiny.model(**given, **{CACHE: cache}, use_cache=True).logits, []
        for token in TOKENS:
            inputs = step(tiny, given, token, cache)
            after.append(tiny.model(**inputs, use_cache=True).logits[:, -1])
            given = {name: inputs[name] for name in ("attention_mask", "position_ids")}
    return logits, torch.stack(after), cache


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("action", ["route", "remove"])
@pytest.mark.parametrize("kind", SLIDING)
def test_a_sliding_type_against_the_oracle(kind: str, action: Any, attention: str) -> None:
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
