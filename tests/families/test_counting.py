"""Layers that scale queries by how many rows came before, against the dense oracle: Llama 4's without rotation."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from dense import near, predict
from test_types import batch, prompt
from test_windows import LAYERS, TOKENS, decode
from tiny_types import TinyType, build

import reroute
from reroute.errors import RerouteError, UnsupportedModelError
from reroute.transformers.adapters.llama4 import Llama4

FLOOR = 32
"""Rows that queries are not scaled by."""
LONGEST = prompt(0, 8, 15, 8)
"""Of the prompts that fit before."""


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[TinyType]:
    model = build("llama4", "sdpa", layers=8)
    for layer in model.layers:
        monkeypatch.setattr(layer.self_attn, "floor_scale", FLOOR)
        monkeypatch.setattr(layer.self_attn, "attn_scale", 0.5)
    yield model
    reroute.disable(model.model)


@torch.no_grad()
def test_answers_that_grow_beyond_what_prompts_may_reach(tiny: TinyType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(LONGEST) == FLOOR - 1
    handle = reroute.enable(tiny.model, schedule=reroute.Schedule(LAYERS, (0.4, 0.7)))
    logits, after, _ = decode(handle, tiny, LONGEST)
    handle.disable()
    monkeypatch.setattr(tiny.text.config, "_attn_implementation", "eager")
    expected = predict(tiny, [*LONGEST, *TOKENS], LAYERS, (0.4, 0.7), prompt=len(LONGEST))
    near(logits[0], expected.logits[: len(LONGEST)])
    near(after[:, 0], expected.logits[len(LONGEST) :])
    monkeypatch.setattr(tiny.layers[6].self_attn, "attn_temperature_tuning", False)
    unscaled = predict(tiny, [*LONGEST, *TOKENS], LAYERS, (0.4, 0.7), prompt=len(LONGEST))
    with pytest.raises(AssertionError):
        near(unscaled.logits, expected.logits)


@torch.no_grad()
def test_prompts_that_are_too_long(tiny: TinyType) -> None:
    handle = reroute.enable(tiny.model, schedule=reroute.Schedule(LAYERS, (0.4, 0.7)))
    given = batch(tiny, [*LONGEST, 3])
    with pytest.raises(RerouteError, match=r"Layers \[2, 4, 6\] scale queries .* from position 31 on"):
        handle.plan(given["input_ids"])
    with handle.at(keep=1.0):
        handle.plan(given["input_ids"])


@pytest.mark.parametrize("said", [2 * FLOOR, sys.maxsize, None])
def test_what_is_said_of_it_is_proved(tiny: TinyType, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Llama4, "counts_from", lambda *_: said)
    sentence = "counts the rows" if said is None else "of rows behind others than is known"
    model = copy.deepcopy(tiny.model)  # of which nothing is known yet
    with pytest.raises(UnsupportedModelError, match=rf"(?s)Decoder layer 2 .*{sentence}"):
        reroute.enable(model, schedule=reroute.Schedule(LAYERS, (0.4, 0.7)))
