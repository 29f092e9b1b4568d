"""Promise 5: the cache holds what the stages ran on and nothing else, and can be handled like any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import CACHE, NAMES, Sample, Tiny
from models import tiny as shared
from oracle import MARGIN, Rules, predict
from support import RULES, any_prompt, any_rules, cache_of, close, enable, kv_lengths
from torch import Tensor
from transformers import DynamicCache

from reroute.errors import UnsupportedCacheError


def prefilled(tiny: Tiny, samples: list[Sample]) -> Any:
    return cache_of(tiny.model(**tiny.inputs(samples, positions=True), use_cache=True))


@pytest.mark.parametrize("rules", RULES)
def test_layers_hold_text_and_what_was_kept(tiny: Tiny, rules: Rules) -> None:
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    n, m = len(sample.visual), sample.texts
    stages = [sum(first <= layer for first in rules.layers) - 1 for layer in range(tiny.num_layers)]
    kept = [n if stage < 0 else max(1, int(n * rules.ratios[stage])) for stage in stages]
    with enable(tiny, rules):
        cache = prefilled(tiny, [sample])
    assert kv_lengths(cache) == [m + k for k in kept]
    assert [layer.values.shape[-2] for layer in cache.layers] == [m + k for k in kept]


def test_memory_is_really_saved(tiny: Tiny) -> None:
    """A view into a full-length tensor would have the right shape and save nothing."""
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    with enable(tiny, RULES[0]):
        cache = prefilled(tiny, [sample])
    for layer in cache.layers:
        for held in (layer.keys, layer.values):
            assert held.untyped_storage().nbytes() == held.numel() * held.element_size()


def test_the_cache_says_that_it_is_of_logical_length(tiny: Tiny) -> None:
    sample, more = tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 3)
    with enable(tiny, RULES[1]):
        cache = prefilled(tiny, [sample])
        assert cache.get_seq_length() == len(sample)
        assert [cache.get_seq_length(i) for i in range(tiny.num_layers)] == [len(sample)] * tiny.num_layers
        tiny.model(**tiny.follow([sample], [more]), **{CACHE: cache})
        assert [cache.get_seq_length(i) for i in range(tiny.num_layers)] == [len(sample) + 3] * tiny.num_layers
        assert cache.get_mask_sizes(2, 4) == (len(sample) + 5, 0)


@pytest.mark.parametrize("make", [lambda config: DynamicCache(), lambda config: DynamicCache(config=config)])
def test_own_dynamic_cache(tiny: Tiny, make: Callable[[Any], Any]) -> None:
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    cache = make(tiny.model.config.get_text_config())
    with enable(tiny, RULES[0]):
        output = tiny.model(**tiny.inputs([sample]), **{CACHE: cache})
    expected = predict(tiny, sample, RULES[0])
    assert cache_of(output) is cache
    close(output.logits[0], expected.logits)
    assert kv_lengths(cache) == expected.kv_lengths


def test_no_cache_is_made_unless_wanted(tiny: Tiny) -> None:
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    with enable(tiny, RULES[0]) as handle:
        output = tiny.model(**tiny.inputs([sample]), use_cache=False)
    close(output.logits[0], predict(tiny, sample, RULES[0]).logits)
    assert cache_of(output) is None
    assert handle.stats().kv_bytes == 0


# --- moving samples -----------------------------------------------------------------------------------------------


MOVES: dict[str, tuple[Callable[[Any], None], list[int]]] = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("rules", RULES)
def test_samples_can_be_moved(tiny: Tiny, move: str, rules: Rules) -> None:
    """Rows of different lengths, so that the fillers must move along."""
    before = [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 1, tiny.grid, 2, tiny.grid, 3), tiny.prompt(2, 9)]
    act, order = MOVES[move]
    moved = [before[b] for b in order]
    new = [tiny.prompt(10 + i, 3) for i in range(len(moved))]
    mask = tiny.inputs(before)["attention_mask"][order]
    with enable(tiny, rules):
        cache = prefilled(tiny, before)
        act(cache)
        given = tiny.follow(moved, new)
        given["attention_mask"] = torch.cat([mask, torch.ones(len(moved), 3, dtype=torch.long)], dim=1)
        logits = tiny.model(**given, **{CACHE: cache}).logits
    for row, sample, tokens in zip(logits, moved, new, strict=True):
        close(row, predict(tiny, [sample, tokens], rules).logits[len(sample) :])


def test_renumbered_rows_move_along() -> None:
    """Rows that dropped different numbers of tokens also differ in their position ids from then on."""
    tiny, rules = shared("llava-gqa"), Rules((2, 5), (0.5, 0.25), "remove", position_mode="renumbered")
    before = [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 1, tiny.grid, 2, tiny.grid, 3)]
    moved = [before[1], before[0]]
    new = [tiny.prompt(10, 3), tiny.prompt(11, 3)]
    mask = tiny.inputs(before)["attention_mask"]
    with enable(tiny, rules):
        cache = prefilled(tiny, before)
        cache.reorder_cache(torch.tensor([1, 0]))
        given = tiny.follow(moved, new)
        given["attention_mask"] = torch.cat([mask.flip(0), torch.ones(2, 3, dtype=torch.long)], dim=1)
        logits = tiny.model(**given, **{CACHE: cache}).logits
    for row, sample, tokens in zip(logits, moved, new, strict=True):
        close(row, predict(tiny, [sample, tokens], rules).logits[len(sample) :])


# --- shortening ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", RULES)
def test_newest_tokens_can_be_cropped(tiny: Tiny, rules: Rules) -> None:
    sample, draft, real = tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 5), tiny.prompt(2, 4)
    with enable(tiny, rules):
        cache = prefilled(tiny, [sample])
        tiny.model(**tiny.follow([sample], [draft]), **{CACHE: cache})
        cache.crop(-3)
        assert cache.get_seq_length() == len(sample) + 2
        start = Sample(draft.ids[:2])
        logits = tiny.model(**tiny.follow([sample + start], [real]), **{CACHE: cache}).logits
    expected = predict(tiny, [sample, start, real], rules)
    close(logits[0], expected.logits[-4:])
    assert kv_lengths(cache) == expected.kv_lengths


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("amount", [-8, 1, 40])
def test_a_routed_prompt_is_not_cropped(tiny: Tiny, rules: Rules, amount: int) -> None:
    """Nor is any layer of its cache. A positive number is the length that was left in earlier releases."""
    sample, more = tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 3)
    with enable(tiny, rules):
        cache = prefilled(tiny, [sample])
        tiny.model(**tiny.follow([sample], [more]), **{CACHE: cache})
        lengths = kv_lengths(cache)
        with pytest.raises(UnsupportedCacheError, match=r"only its 7 tokens .* crop\(-7\) to crop\(0\)"):
            cache.crop(amount)
    assert kv_lengths(cache) == lengths
    assert cache.get_seq_length() == len(sample) + 3


def test_reset_makes_it_an_empty_cache(tiny: Tiny) -> None:
    first, second = tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 2, tiny.grid, 7)
    with enable(tiny, RULES[0]):
        cache = prefilled(tiny, [first])
        cache.reset()
        assert cache.get_seq_length() == 0
        output = tiny.model(**tiny.inputs([second]), **{CACHE: cache})
    expected = predict(tiny, second, RULES[0])
    close(output.logits[0], expected.logits)
    assert kv_lengths(cache) == expected.kv_lengths


@settings(max_examples=30)
@given(st.data())
def test_any_cache(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    tiny = shared(name)
    sample = data.draw(any_prompt(name, pictures=(1, 3)))
    rules = data.draw(any_rules())
    expected = predict(tiny, sample, rules)
    assume(expected.margin > MARGIN)
    with enable(tiny, rules):
        cache = prefilled(tiny, [sample])
    assert kv_lengths(cache) == expected.kv_lengths
    total: Tensor = expected.active.sum()
    assert sum(kv_lengths(cache)) == int(total)
    assert cache.get_seq_length() == len(sample)


@pytest.mark.parametrize("rules", RULES)
def test_a_routed_cache_is_not_continued_without_routing(tiny: Tiny, rules: Rules) -> None:
    """It would go wrong without a word wherever masks or positions have to be adapted."""
    sample, more = tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 1)
    with enable(tiny, rules):
        cache = prefilled(tiny, [sample])
    given, lengths = tiny.follow([sample], [more]), kv_lengths(cache)
    with pytest.raises(UnsupportedCacheError, match="filled while routing was on"):
        tiny.model(**given, **{CACHE: cache})
    assert kv_lengths(cache) == lengths
    with enable(tiny, rules):  # as the message says
        fresh = prefilled(tiny, [sample])
        expected = tiny.model(**given, **{CACHE: fresh}).logits
        assert torch.equal(tiny.model(**given, **{CACHE: cache}).logits, expected)
