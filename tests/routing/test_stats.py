"""Budgets are honest: what ``stats()`` and ``totals()`` say of prefills that were routed, or might have been."""

from __future__ import annotations

import threading
import time
from typing import Any

import models
import pytest
import torch
from models import CACHE, PAD, Tiny
from oracle import Rules
from support import RULES, cache_of, enable, fixed, generate, kv_lengths, schedule
from torch import nn

import reroute
from reroute.core.cost import ModelShape, estimate_cost, prefill_cost
from reroute.methods import FastV, Random
from reroute.rankers import LastTokenAttention
from reroute.stats import LayerRows, Stats, Totals, make_stats
from reroute_kernels import PagedPool

TWO_PICTURES_ONLY = Rules((2,), (0.97,), rounding="half_even")
"""Keeps all of one picture's 16 tokens, and 31 of two pictures' 32."""


def shape_of(tiny: Tiny) -> ModelShape:
    return ModelShape.from_config(tiny.model.config.get_text_config())


def held(cache: Any) -> int:
    """Bytes of the keys and values in a cache."""
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


# --- one prefill --------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_prefill(tiny: Tiny) -> None:
    pair = [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(7, 2, tiny.grid, 7)]  # as long as one another: no fillers
    with enable(tiny, RULES[0]) as handle:
        assert handle.stats().prefills == 0
        cache = cache_of(tiny.model(**tiny.inputs(pair), use_cache=True))
        stats = handle.stats()
        tiny.model(**tiny.inputs([tiny.prompt(8, 5)]))  # text: nothing to route
        assert handle.stats() == stats
    assert (stats.prefills, stats.layers, stats.visual) == (1, RULES[0].layers, (16, 16))
    assert stats.kept == ((8, 4, 2), (8, 4, 2))
    assert stats.avg_tokens == pytest.approx((2 * 16 + 2 * 8 + 2 * 4 + 2 * 2) / 8)
    assert stats.keep == pytest.approx(stats.avg_tokens / 16)
    assert stats.kv_bytes == held(cache)
    assert stats.kv_bytes_dense > stats.kv_bytes
    assert 0 < stats.scoring_flops < stats.prefill_flops < stats.prefill_flops_dense


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_prefill_costs_its_budget(tiny: Tiny, rules: Rules, batch: int) -> None:
    """What was planned for one prompt, for each of a batch of equals: measured bytes included."""
    with enable(tiny, rules) as handle:
        tiny.model(**tiny.inputs([tiny.prompt(seed, 5, tiny.grid, 4) for seed in range(batch)]), use_cache=True)
    stats = handle.stats()
    planned = estimate_cost(shape_of(tiny), schedule(rules), rules.action, 16, 9, bytes_per_element=4)
    assert (stats.avg_tokens, stats.keep) == (planned.avg_tokens, planned.keep)
    assert stats.prefill_flops == batch * planned.prefill_flops
    assert stats.scoring_flops == batch * planned.scoring_flops
    assert stats.kv_bytes == batch * planned.kv_bytes


@pytest.mark.parametrize(
    "method",
    [Random(layer=3, ratio=0.25), fixed(((3, 0.25),), (tuple(map(float, range(16))),))],
    ids=lambda method: method.name,
)
def test_own_scores_are_not_charged_for_attention(tiny: Tiny, method: FastV) -> None:
    stats = []
    for chosen in (FastV(layer=3, ratio=0.25), method):
        with reroute.enable(tiny.model, method=chosen, action="remove") as handle:
            tiny.model(**tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)]))
        stats.append(handle.stats())
    attention, own = stats
    assert attention.scoring_flops == LastTokenAttention().flops(shape_of(tiny), 25, 16, 4)
    assert own.scoring_flops == 0
    assert own.prefill_flops == attention.prefill_flops - attention.scoring_flops


@pytest.mark.parametrize("rules", RULES)
def test_later_turns_attend_to_earlier_ones(tiny: Tiny, rules: Rules) -> None:
    """Queries of the new turn, keys of what each layer holds; scores are of the new turn alone."""
    turns = [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 2, tiny.grid, 5)]
    shape = shape_of(tiny)
    with enable(tiny, rules) as handle:
        cache = cache_of(tiny.model(**tiny.inputs(turns[:1]), use_cache=True))
        before, first = kv_lengths(cache), handle.stats()
        tiny.model(**tiny.follow(turns[:1], turns[1:]), **{CACHE: cache}, use_cache=True)
        stats, keys = handle.stats(), kv_lengths(cache)
    tokens = [after - earlier for after, earlier in zip(keys, before, strict=True)]
    routed = prefill_cost(shape, tokens, keys)
    dense = prefill_cost(shape, [23] * 8, [25 + 23] * 8, bytes_per_element=4)
    alone = estimate_cost(shape, schedule(rules), rules.action, 16, 7)
    assert stats.prefill_flops - stats.scoring_flops == routed.prefill_flops
    assert stats.scoring_flops == alone.scoring_flops
    assert stats.prefill_flops > alone.prefill_flops
    assert (stats.prefill_flops_dense, stats.kv_bytes_dense) == (dense.prefill_flops, dense.kv_bytes)
    assert first.kv_bytes < stats.kv_bytes == held(cache)


def test_text_in_the_batch_does_not_dilute_the_average(tiny: Tiny) -> None:
    samples = [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 25)]
    stats = []
    for batch in (samples[:1], samples):
        with enable(tiny, RULES[0]) as handle:
            tiny.model(**tiny.inputs(batch))
        stats.append(handle.stats())
    assert stats[1].visual == (16, 0)
    assert (stats[1].avg_tokens, stats[1].keep) == (stats[0].avg_tokens, stats[0].keep)


def test_no_cache_saves_no_memory(tiny: Tiny) -> None:
    with enable(tiny, RULES[0]) as handle:
        tiny.model(**tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)]), use_cache=False)
    assert (handle.stats().kv_bytes, handle.stats().kv_bytes_dense) == (0, 0)


# --- prefills that nothing is deferred in -------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["route", "remove"])
def test_keeping_everything_is_recorded(tiny: Tiny, action: Any) -> None:
    """A sweep over budgets needs no special case at 1. Rows of padding run too; none is leased."""
    pool = PagedPool(64, torch.float32, "cpu")
    samples = [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 2, tiny.grid, 1, tiny.grid, 3), tiny.prompt(2, 6)]
    given = tiny.inputs(samples)
    for name in {"input_ids", "attention_mask", "mm_token_type_ids"} & given.keys():
        given[name] = nn.functional.pad(given[name], (3, 0), value=PAD)
    with reroute.enable(tiny.model, keep=1.0, action=action, pool=pool, trace=True) as handle:
        cache = cache_of(tiny.model(**given, use_cache=True))
        assert handle.trace is None
    stats = handle.stats()
    assert (stats.prefills, stats.visual, stats.avg_tokens, stats.keep) == (1, (16, 32, 0), 24, 1)
    assert [set(kept) for kept in stats.kept] == [{16}, {32}, {0}]
    assert stats.layer_lengths == (38 + 3,) * 8
    assert (stats.scoring_flops, stats.prefill_flops) == (0, stats.prefill_flops_dense)
    assert stats.kv_bytes == stats.kv_bytes_dense == held(cache)
    assert "ratio 1.000" in str(stats)
    assert pool.stats().pages == 0


def test_a_dense_prefill_replaces_the_statistics_of_a_routed_one(tiny: Tiny) -> None:
    one, two = tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 2, tiny.grid, 1, tiny.grid, 3)
    with enable(tiny, TWO_PICTURES_ONLY) as handle:
        tiny.model(**tiny.inputs([two]))
        assert (handle.stats().kept, len(handle.trace)) == (((31,),), 1)
        tiny.model(**tiny.inputs([one]))
        assert (handle.stats().kept, handle.trace) == (((16,),), None)
        assert handle.stats().prefills == 2


def test_a_dense_turn_after_a_routed_one(tiny: Tiny) -> None:
    """It runs every token, on keys that the first turn left out."""
    turns = [tiny.prompt(1, 2, tiny.grid, 1, tiny.grid, 3), tiny.prompt(0, 5, tiny.grid, 4)]
    with enable(tiny, TWO_PICTURES_ONLY) as handle:
        cache = cache_of(tiny.model(**tiny.inputs(turns[:1]), use_cache=True))
        tiny.model(**tiny.follow(turns[:1], turns[1:]), **{CACHE: cache}, use_cache=True)
    stats = handle.stats()
    assert (stats.avg_tokens, stats.scoring_flops) == (16, 0)
    expected = prefill_cost(shape_of(tiny), [25] * 8, kv_lengths(cache), bytes_per_element=4)
    assert (stats.prefill_flops, stats.kv_bytes) == (expected.prefill_flops, expected.kv_bytes)
    assert stats.prefill_flops < stats.prefill_flops_dense


@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_only_prefills_that_succeed_are_recorded(tiny: Tiny, keep: float) -> None:
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])
    with reroute.enable(tiny.model, keep=keep) as handle:
        norm = tiny.model.model.language_model.norm
        failing = norm.register_forward_pre_hook(lambda *_: pytest.fail("out of memory"))
        with pytest.raises(pytest.fail.Exception):
            tiny.model(**given)
        failing.remove()
        assert handle.totals() == Totals()
        generate(tiny, given, 4)  # one prefill, three decode steps
        assert (handle.stats().prefills, handle.totals().prefills) == (1, 1)


# --- all of them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [RULES[0], TWO_PICTURES_ONLY])
def test_totals_do_not_depend_on_batches(tiny: Tiny, rules: Rules) -> None:
    """A data set with prompts of text in it: sums over prefills, means over the prompts with pictures."""
    samples = [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 2, tiny.grid, 1, tiny.grid, 3), tiny.prompt(2, 6)]
    with enable(tiny, rules) as handle:
        assert "no prefill with visual tokens" in str(handle.totals())
        singles = []
        for sample in samples:
            tiny.model(**tiny.inputs([sample]), use_cache=True)
            singles.append(handle.stats())
        one_by_one = handle.totals()
    with enable(tiny, rules) as handle:
        tiny.model(**tiny.inputs(samples), use_cache=True)
        together = handle.totals()
    pictures = singles[:2]
    assert (one_by_one.prefills, one_by_one.prompts) == (2, 2)
    assert (together.prefills, together.prompts) == (1, 2)
    for totals in (one_by_one, together):
        assert totals.avg_visual == 24
        assert totals.avg_tokens == pytest.approx(sum(s.avg_tokens for s in pictures) / 2)
        assert totals.keep == pytest.approx(totals.avg_tokens / 24)
    for name in ("prefill_flops", "scoring_flops", "prefill_flops_dense", "kv_bytes", "kv_bytes_dense"):
        assert getattr(one_by_one, name) == sum(getattr(s, name) for s in pictures)
    assert str(one_by_one).startswith("2 prefills of 2 prompts, 24.0 visual tokens each\navg_T ")


def test_a_window_before_the_first_routing_layer_saves_nothing(tiny: Tiny) -> None:
    """Such a layer stores no more without routing."""
    with enable(tiny, Rules((2,), (1.0,))) as handle:
        plan = handle.plan(tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])["input_ids"])
    assert plan is not None
    rows = [7, 7, *[plan.length] * (tiny.num_layers - 2)]
    shape = shape_of(tiny)
    size = 2 * 4 * shape.kv_heads * shape.head_dim
    layers = [LayerRows(n, n if n == 7 else None, None, n * size, size, 4, 0) for n in rows]
    names = {"method": "", "action": "route", "backend": "", "backend_reason": ""}
    stats = make_stats(plan, shape, names, layers, prefills=1)
    assert stats.prefill_flops == stats.prefill_flops_dense
    assert stats.kv_bytes == stats.kv_bytes_dense


def test_threads_add_to_the_same_totals(monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(*args: Any, **settings: Any) -> Stats:
        stats = make_stats(*args, **settings)
        time.sleep(0.02)  # whoever does not wait their turn counts from the same sums
        return stats

    monkeypatch.setattr("reroute.handle.make_stats", slowly)
    tiny = models.tiny("llava-gqa")
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])

    def work() -> None:
        with torch.no_grad():
            for _ in range(3):
                tiny.model(**given)

    with enable(tiny, RULES[0]) as handle:
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    stats, totals = handle.stats(), handle.totals()
    assert (stats.prefills, totals.prefills, totals.prompts) == (9, 9, 9)
    assert totals.prefill_flops == 9 * stats.prefill_flops


def test_statistics_that_cannot_be_made_cost_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ranker's own count may fail; it is asked when somebody asks, and says so once."""
    tiny = models.tiny("llava-gqa")
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])
    outcomes = iter([None, ZeroDivisionError(), None])

    def made(*args: Any, **settings: Any) -> Stats:
        error = next(outcomes)
        if error is not None:
            raise error
        return make_stats(*args, **settings)

    with enable(tiny, RULES[0]) as handle, torch.no_grad():
        for _ in range(3):
            tiny.model(**given)
        monkeypatch.setattr("reroute.handle.make_stats", made)
        with pytest.raises(ZeroDivisionError):
            handle.totals()
        assert handle.totals().prefills == 2
