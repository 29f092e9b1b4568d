"""The conventions on which papers differ: whose scores, how many, and what positions the kept tokens have."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CACHE, Tiny
from oracle import MARGIN, Rules, predict
from support import (
    any_prompt,
    any_rules,
    cache_of,
    close,
    enable,
    fixed,
    generate,
    kv_lengths,
    new_tokens,
    same_decisions,
)

import reroute
from reroute.methods import FastV, PDrop
from reroute.rankers import LastTokenAttention


def scores_of(n: int, best: tuple[int, ...]) -> tuple[float, ...]:
    """Scores under which ``best`` are kept."""
    return tuple(1.0 if i in best else 0.0 for i in range(n))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> tuple[Tiny, list[Any]]:
    """A model of three layers with nine visual tokens, and the position ids that each layer is called with."""
    tiny = models.llava(layers=3, side=3)
    ids: list[Any] = []
    for layer in tiny.model.model.language_model.layers:
        attention = layer.self_attn

        def spy(*args: Any, _original: Any = attention.forward, **kwargs: Any) -> Any:
            ids.append(kwargs["position_ids"][0].tolist())
            return _original(*args, **kwargs)

        monkeypatch.setattr(attention, "forward", spy)
    return tiny, ids


def test_preserved_positions(seen: tuple[Tiny, list[Any]]) -> None:
    """T6: kept tokens and later text keep the ids of the full prompt; generated tokens go on from its length."""
    tiny, ids = seen
    sample = tiny.prompt(0, 2, tiny.grid, 3)
    method = fixed(stages=((1, 0.34),), table=(scores_of(9, (1, 4, 6)),))
    with reroute.enable(tiny.model, method=method):
        output = generate(tiny, [sample], 2)
    compact = [0, 1, 3, 6, 8, 11, 12, 13]
    assert ids == [list(range(14)), compact, compact, [14], [14], [14]]
    assert kv_lengths(cache_of(output)) == [15, 9, 9]


def test_renumbered_positions(seen: tuple[Tiny, list[Any]]) -> None:
    """T7: what is left counts from 0, and a generated token's id is the length of the cache of its layer."""
    tiny, ids = seen
    sample = tiny.prompt(0, 2, tiny.grid, 3)
    with reroute.enable(tiny.model, method=PDrop((1, 2), (0.5, 0.25), "floor0", "renumbered"), action="remove"):
        output = generate(tiny, [sample], 2)
    assert ids == [list(range(14)), list(range(9)), list(range(7)), [14], [9], [7]]
    assert kv_lengths(cache_of(output)) == [15, 10, 8]


@settings(max_examples=30)
@given(st.data())
def test_any_renumbered(data: st.DataObject) -> None:
    tiny = models.tiny(data.draw(st.sampled_from(["llava-mha", "llava-gqa"])))
    sample = data.draw(any_prompt("llava-mha", pictures=(1, 2)))
    rules = data.draw(any_rules(renumbered=True))
    with enable(tiny, rules) as handle:
        output = generate(tiny, [sample], 3)
    tokens = new_tokens(output, len(sample))
    expected = predict(tiny, sample, rules, then=tokens[:-1])
    if expected.margin > MARGIN:
        if handle.trace is not None:
            same_decisions(handle.trace, [expected])
        close(torch.stack(output.logits)[:, 0], expected.logits[len(sample) - 1 :])


def test_the_layer_before_can_rank(tiny: Tiny) -> None:
    """T8: FastV's own convention keeps what the attention of the layer before prefers; both act before the same one."""
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    kept = []
    for offset in (0, -1):
        rules = Rules((3,), (0.25,), "remove", score_layer_offset=offset)
        method = FastV(layer=3, ratio=0.25, ranker=LastTokenAttention(offset))
        with reroute.enable(tiny.model, method=method, action="remove", trace=True) as handle:
            output = tiny.model(**tiny.inputs([sample]), use_cache=True)
        same_decisions(handle.trace, [predict(tiny, sample, rules)])
        assert kv_lengths(cache_of(output)) == [len(sample)] * 3 + [len(sample) - 12] * 5
        assert handle.trace is not None
        kept.append(handle.trace[0].kept[0].tolist())
    assert kept[0] != kept[1]


@pytest.mark.parametrize(("rounding", "count"), [("floor", 1), ("floor0", 0), ("half_even", 0)])
def test_rounding(tiny: Tiny, rounding: str, count: int) -> None:
    """T1: 16 * 0.03 tokens: at least one, none, or the nearest."""
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    rules = Rules((2, 4), (0.5, 0.03), rounding=rounding)
    with enable(tiny, rules) as handle:
        output = tiny.model(**tiny.inputs([sample]))
    assert handle.stats().kept == ((8, count),)
    close(output.logits[0], predict(tiny, sample, rules).logits)


def test_nobody_sees_what_comes_later(tiny: Tiny) -> None:
    """T9: with the same selection, another last token changes no other output."""
    sample = tiny.prompt(0, 3, tiny.grid, 4)
    other = models.Sample((*sample.ids[:-1], sample.ids[-1] % 100 + 1), sample.visual, sample.pixels, sample.grids)
    method = fixed(stages=((2, 0.25), (5, 0.25)), table=(scores_of(16, (0, 3, 5, 9)), scores_of(16, (1, 3, 8, 15))))
    with reroute.enable(tiny.model, method=method):
        a, b = (tiny.model(**tiny.inputs([s])).logits[0] for s in (sample, other))
    close(a[:-1], b[:-1])
    assert (a[-1] - b[-1]).abs().max() > 0.01


def test_selection_by_hand(tiny: Tiny) -> None:
    """T2: given scores; a tie goes to the lower index, and who was left out may return only when routed."""
    s1 = (0.10, 0.30, 0.05, 0.20, 0.15, 0.02, 0.08, 0.10)
    s2 = (0.02, 0.05, 0.40, 0.10, 0.03, 0.22, 0.11, 0.07)
    s3 = (0.30, 0.01, 0.02, 0.04, 0.05, 0.35, 0.20, 0.03)
    stages = ((2, 0.5), (4, 0.5), (6, 0.25))
    qwen = models.tiny("qwen")
    sample = qwen.prompt(0, 2, (2, 4), 1)
    expected = {
        "route": [[0, 1, 3, 4], [2, 3, 5, 6], [0, 5]],
        "remove": [[0, 1, 3, 4], [0, 1, 3, 4], [0, 4]],
    }
    action: Any
    for action, kept in expected.items():
        survivors = ((0, 1, 3, 4), (0, 1, 3, 4)) if action == "remove" else ()
        method = fixed(stages=stages, table=(s1, s2, s3), survivors=survivors)
        with reroute.enable(qwen.model, method=method, action=action, trace=True) as handle:
            output = qwen.model(**qwen.inputs([sample]), use_cache=True)
        assert handle.trace is not None
        assert [stage.kept[0].tolist() for stage in handle.trace] == kept
        assert kv_lengths(getattr(output, CACHE)) == [11, 11, 7, 7, 7, 7, 5, 5]
        assert handle.stats().avg_tokens == 4.5
