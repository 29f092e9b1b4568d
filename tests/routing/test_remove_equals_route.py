"""Promise 2: after a single decision nothing can come back, so `route` and `remove` are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import NAMES, Tiny
from models import tiny as shared
from oracle import Rules, predict
from support import cache_of, enable, fixed, generate, kv_lengths

import reroute
from reroute.methods import FastV


@pytest.mark.parametrize("layer", [0, 3, 7])
@pytest.mark.parametrize("keep", [0.01, 0.4])
def test_one_decision(tiny: Tiny, layer: int, keep: float) -> None:
    samples = [tiny.prompt(0, 3, tiny.grid, 2, tiny.grid, 4), tiny.prompt(1, 5, tiny.grid, 3)]
    found = []
    for action in ("route", "remove"):
        with enable(tiny, Rules((layer,), (keep,), action)) as handle:
            out = tiny.model(**tiny.inputs(samples), use_cache=True, output_hidden_states=True)
            kept = [k.tolist() for k in handle.trace[0].kept]
            generated = generate(tiny, samples, 6)
        found.append((out, kept, generated))
    (a, kept_a, generated_a), (b, kept_b, generated_b) = found
    assert kept_a == kept_b
    assert torch.equal(a.logits, b.logits)
    assert all(map(torch.equal, a.hidden_states, b.hidden_states))
    assert kv_lengths(cache_of(a)) == kv_lengths(cache_of(b))
    for one, two in zip(cache_of(a).layers, cache_of(b).layers, strict=True):
        assert torch.equal(one.keys, two.keys)
        assert torch.equal(one.values, two.values)
    assert torch.equal(generated_a.sequences, generated_b.sequences)
    assert all(map(torch.equal, generated_a.logits, generated_b.logits))


def test_one_decision_by_name(tiny: Tiny) -> None:
    sample = tiny.prompt(0, 3, tiny.grid, 4)
    method = FastV(layer=7, ratio=0.3)  # no later layer to route again in
    outputs = []
    for action in ("route", "remove"):
        with reroute.enable(tiny.model, method=method, action=action):
            outputs.append(tiny.model(**tiny.inputs([sample])).logits)
    assert torch.equal(*outputs)


@settings(max_examples=30)
@given(st.sampled_from(NAMES), st.integers(0, 10**6), st.integers(0, 7), st.floats(0.02, 1.0), st.sampled_from([0, -1]))
def test_one_decision_anywhere(name: str, seed: int, layer: int, keep: float, offset: int) -> None:
    tiny = shared(name)
    sample = tiny.prompt(seed, 1 + seed % 4, tiny.grid, 1 + seed % 3)
    outputs = []
    for action in ("route", "remove"):
        rules = Rules((max(layer, -offset),), (keep,), action, score_layer_offset=offset)
        with enable(tiny, rules):
            outputs.append(tiny.model(**tiny.inputs([sample])).logits)
    assert torch.equal(*outputs)


def test_two_decisions_differ(tiny: Tiny) -> None:
    """Otherwise the tests above would prove nothing."""
    sample = tiny.prompt(0, 3, tiny.grid, 4)
    outputs = []
    for action in ("route", "remove"):
        with enable(tiny, Rules((2, 4), (0.4, 0.4), action)) as handle:
            outputs.append((tiny.model(**tiny.inputs([sample])).logits, handle.trace[1].kept[0].tolist()))
    (routed, kept), (removed, survivors) = outputs
    assert kept != survivors
    assert (routed - removed).abs().max() > 0.01


def test_route_equals_remove_when_nobody_returns(tiny: Tiny) -> None:
    """The pools differ, and so would the scores; with given scores that nest, the computation is the same."""
    n = tiny.grid[0] * tiny.grid[1]
    first = tuple(float(i in (1, 4, 5, 9, 12, 15)) for i in range(n))
    second = tuple(float(i in (4, 9, 15)) for i in range(n))
    survivors = tuple(i for i in range(n) if first[i])
    stages = ((2, 6 / n), (5, 3 / n))
    samples = [tiny.prompt(0, 3, tiny.grid, 4)]
    routed = fixed(stages=stages, table=(first, second))
    removed = fixed(stages=stages, table=(first, second), survivors=(survivors,))
    outputs = []
    cases: tuple[tuple[Any, Any], ...] = (("route", routed), ("remove", removed))
    for action, method in cases:
        with reroute.enable(tiny.model, method=method, action=action, trace=True) as handle:
            outputs.append(torch.stack(generate(tiny, samples, 5).logits))
            assert [s.kept[0].tolist() for s in handle.trace] == [list(survivors), [4, 9, 15]]
    assert torch.equal(*outputs)


def test_the_oracle_agrees(tiny: Tiny) -> None:
    sample = tiny.prompt(0, 3, tiny.grid, 4)
    route, remove = (predict(tiny, sample, Rules((3,), (0.4,), action)) for action in ("route", "remove"))
    assert torch.equal(route.logits, remove.logits)
