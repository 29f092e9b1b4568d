"""Later turns that choose again: each is what a fresh prompt of the whole conversation would be."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from models import CACHE, Sample, Tiny
from models import tiny as shared
from oracle import Rules, predict
from support import RULES, cache_of, close, enable, generate, kv_lengths, same_decisions
from torch import Tensor

import reroute

EARLY = Rules((3, 5), (0.5, 0.25), score_layer_offset=-1)
"""Scores a layer earlier: a layer between runs all tokens again, dense."""


def turn(tiny: Tiny, cache: Any, before: Sequence[Sample], new: Sequence[Sample], side: str = "left") -> Tensor:
    """Logits of ``new`` after ``before``, which are in ``cache`` as one batch."""
    logits: Tensor = tiny.model(**tiny.follow(before, new, side), **{CACHE: cache}).logits
    return logits


def first(tiny: Tiny, samples: Sequence[Sample], side: str = "left") -> Any:
    return cache_of(tiny.model(**tiny.inputs(samples, side, positions=True), use_cache=True))


@pytest.mark.parametrize("rules", [*RULES, EARLY])
def test_a_later_turn_is_a_fresh_prompt_of_the_conversation(tiny: Tiny, rules: Rules) -> None:
    """Three turns, the last of them with a new picture: logits, decisions, and what the cache holds."""
    parts = [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 6), tiny.prompt(2, 2, tiny.grid, 3)]
    with enable(tiny, rules, reopens=True) as handle:
        cache = first(tiny, parts[:1])
        said = parts[0]
        for part in parts[1:]:
            logits = turn(tiny, cache, [said], [part])
            said += part
            expected = predict(tiny, said, rules)
            close(logits[0], expected.logits[-len(part) :])
            same_decisions(handle.trace, [expected])
            assert kv_lengths(cache) == expected.kv_lengths
            assert cache.get_seq_length() == len(said)
