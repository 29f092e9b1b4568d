"""Calls that overlap in threads, and changes of routing while calls run: right, or refused with nothing changed."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
from collections import Counter
from typing import Any

import models
import pytest
import torch
from models import Tiny
from oracle import predict
from support import FAMILIES, FEW, close, enable, generate, small, snapshot
from threads import all_equal, logits_of, together
from torch import Tensor

import reroute
from reroute.methods import FastV
from reroute.stats import Stats

# --- first calls --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_hasty")
@pytest.mark.parametrize("family", FAMILIES)
def test_first_calls_under_process_wide_routing(family: str) -> None:
    """Of eight threads: all are routed and recorded, and there is one handle."""
    tiny = models.llava(layers=2, side=2) if family == "llava" else models.qwen(layers=2)
    sample = tiny.prompt(3, 5, tiny.grid, 5)
    given = tiny.inputs([sample])
    settings: dict[str, Any] = {"schedule": reroute.Schedule((1,), (0.25,))}
    plain = tiny.model(**given).logits
    before = snapshot(tiny.model)  # Transformers adds hooks of its own in a first call
    with reroute.enable(tiny.model, **settings):
        logits, tokens = tiny.model(**given).logits, generate(tiny, given, 2, use_cache=False).sequences
    assert not torch.equal(plain, logits)
    forward = lambda: tiny.model(**given).logits
    generation = lambda: generate(tiny, given, 2, use_cache=False).sequences
    for round_ in range(25):
        reroute.enable(**settings)
        try:
            calls = [forward] * 8 if round_ % 5 else [forward, generation] * 4
            results = together(calls)
            handle = reroute.handle_of(tiny.model)
            assert handle is not None
            assert handle.is_enabled
            all_equal([x for x, call in zip(results, calls, strict=True) if call is forward], logits)
            all_equal([x for x, call in zip(results, calls, strict=True) if call is generation], tokens)
            assert handle.totals().prefills == sum(1 if call is forward else 2 for call in calls)
        finally:
            reroute.disable()
        assert snapshot(tiny.model) == before
    assert torch.equal(tiny.model(**given).logits, plain)


@pytest.mark.usefixtures("_hasty")
def test_first_calls_of_several_models() -> None:
    """None waits in vain for another one."""
    tinies = [models.llava(layers=2, side=2, seed=seed) for seed in range(4)]
    given = tinies[0].inputs([tinies[0].prompt(3, 5, tinies[0].grid, 5)])
    settings: dict[str, Any] = {"schedule": reroute.Schedule((1,), (0.25,))}
    expected = []
    for tiny in tinies:
        with reroute.enable(tiny.model, **settings):
            expected.append(tiny.model(**given).logits)
    for _ in range(5):
        reroute.enable(**settings)
        try:
            results = together([functools.partial(logits_of, tiny, given) for tiny in tinies for _ in range(2)])
            for number in range(len(tinies)):
                all_equal(results[2 * number : 2 * number + 2], expected[number])
        finally:
            reroute.disable()


@pytest.mark.usefixtures("_hasty")
def test_one_model_is_enabled_by_many(few: Tiny) -> None:
    """The last one stays, whoever it is; the others are over."""
    given = few.inputs([few.prompt(3, 5, few.grid, 5)])
    plain, before = few.model(**given).logits, snapshot(few.model)
    ratios = [0.2 + 0.1 * number for number in range(6)]
    for _ in range(5):
        schedules = [reroute.Schedule((2,), (ratio,)) for ratio in ratios]
        handles = together([functools.partial(reroute.enable, few.model, schedule=chosen) for chosen in schedules])
        (there,) = [handle for handle in handles if handle.is_enabled]
        few.model(**given)
        assert there.stats().kept == ((there.schedule.counts(16)[0],),)
        assert reroute.handle_of(few.model) is there
        for handle in handles:
            handle.disable()
        assert snapshot(few.model) == before
    assert torch.equal(few.model(**given).logits, plain)


# --- settings of each call ----------------------------------------------------------------------------------------

SETTINGS: tuple[dict[str, Any], ...] = (
    {"keep": 0.4},
    {"keep": 0.8},
    {"keep": 1.0},
    {"method": "fastv", "keep": 0.5},
    {"method": FastV(layer=2, ratio=0.3), "action": "remove"},
    {"schedule": reroute.Schedule((1, 2), (0.6, 0.2))},
    {"action": "remove"},
    {},
)


@pytest.mark.usefixtures("_hasty")
def test_settings_of_each_thread(few: Tiny) -> None:
    """Those of the others do not matter, and nothing is attached anew."""
    prompts = [few.prompt(seed, 5, few.grid, 5 + seed) for seed in range(len(SETTINGS))]

    def run(number: int) -> Tensor:
        given = few.inputs([prompts[number]])
        with handle.at(**SETTINGS[number]):
            return torch.cat([few.model(**given).logits, few.model.model(**given).last_hidden_state], -1)

    with enable(few, FEW) as handle:
        before = snapshot(few.model)
        alone = [run(number) for number in range(len(SETTINGS))]
        for _ in range(4):
            results = together([functools.partial(run, number) for number in range(len(SETTINGS))])
            for result, expected in zip(results, alone, strict=True):
                all_equal([result], expected)
        assert snapshot(few.model) == before
        assert handle.totals().prefills == 5 * 2 * len(SETTINGS)


@pytest.mark.usefixtures("_hasty")
def test_generations_of_each_thread() -> None:
    """With a cache and without, of prompts of different lengths. (M-RoPE keeps an offset on the model: one family.)"""
    few = small("llava")
    prompts = [few.prompt(seed, 5, few.grid, 3 + 2 * seed) for seed in range(4)]

    def run(number: int) -> Tensor:
        with handle.at(**SETTINGS[number]):
            return torch.stack(generate(few, [prompts[number]], 3, use_cache=number % 2 == 0).logits)

    with enable(few, FEW) as handle:
        alone = [run(number) for number in range(4)]
        for _ in range(3):
            results = together([functools.partial(run, number) for number in range(4)])
            for result, expected in zip(results, alone, strict=True):
                all_equal([result], expected)


def test_what_a_thread_inherits(few: Tiny) -> None:
    """Nothing, unless it is given the context: as ``asyncio.to_thread`` does."""
    given = few.inputs([few.prompt(3, 5, few.grid, 5)])
    with enable(few, FEW) as handle:
        usual = few.model(**given).logits
        with handle.at(keep=0.4):
            changed = few.model(**given).logits
            context = contextvars.copy_context()
            results = together([lambda: few.model(**given).logits, lambda: context.run(few.model, **given).logits])
    assert not torch.equal(usual, changed)
    all_equal(results[:1], usual)
    all_equal(results[1:], changed)


@pytest.mark.usefixtures("_hasty")
def test_settings_of_each_task(few: Tiny) -> None:
    """Tasks take turns in the midst of their blocks, and have their forwards run in threads."""
    given = few.inputs([few.prompt(3, 5, few.grid, 5)])

    async def serve(settings: dict[str, Any]) -> Tensor:
        with handle.at(**settings):
            await asyncio.sleep(0)
            output = await asyncio.to_thread(few.model, **given)
            await asyncio.sleep(0)
            here: Tensor = few.model(**given).logits
        assert torch.equal(output.logits, here)
        return here

    async def all_of_them() -> list[Tensor]:
        return list(await asyncio.gather(*map(serve, SETTINGS)))

    with enable(few, FEW) as handle:
        expected = []
        for settings in SETTINGS:
            with handle.at(**settings):
                expected.append(few.model(**given).logits)
        for actual, logits in zip(asyncio.run(all_of_them()), expected, strict=True):
            assert torch.equal(actual, logits)


@pytest.mark.usefixtures("_hasty")
def test_forwards_of_one_plan_in_threads(few: Tiny) -> None:
    """They have the block's context, and overlap; one goes on when the block has ended."""
    prompts = [few.prompt(seed, 5, few.grid, 5) for seed in range(4)]
    given = [few.inputs([prompt]) for prompt in prompts]
    expected = [predict(few, prompt, FEW).logits for prompt in prompts]
    with enable(few, FEW) as handle:
        for _ in range(3):
            with handle.using(handle.plan(given[0]["input_ids"])):
                contexts = [contextvars.copy_context() for _ in given]
                runs = [functools.partial(c.run, logits_of, few, g) for c, g in zip(contexts, given, strict=True)]
                results = together(runs)
            results += together(runs)
            for number, result in enumerate(results):
                assert isinstance(result, Tensor), repr(result)
                close(result[0], expected[number % 4])


# --- statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_hasty")
def test_each_prefill_is_told_in_its_thread(few: Tiny) -> None:
    """Its stats are those of its settings; the totals are the sums of all."""
    told: list[tuple[int, Stats]] = []
    mine: dict[int, list[tuple[int, ...]]] = {}

    def run(number: int) -> None:
        given = few.inputs([few.prompt(number, 5, few.grid, 5 + number)] * (1 + number % 2))
        kept: list[tuple[int, ...]] = []
        with handle.at(schedule=reroute.Schedule((2,), (0.1 * (number + 2),))):
            for _ in range(3):
                few.model(**given)
                kept.append((int(16 * 0.1 * (number + 2)),))
        mine[threading.get_ident()] = kept

    with enable(few, FEW) as handle:
        end = handle.on_prefill(lambda stats: told.append((threading.get_ident(), stats)))
        errors = together([functools.partial(run, number) for number in range(8)])
        assert errors == [None] * 8
        totals = handle.totals()
        end()
        few.model(**few.inputs([few.prompt(0, 5, few.grid, 5)]))
    assert len(told) == 24
    for thread, kept in mine.items():
        assert [stats.kept[0] for who, stats in told if who == thread] == kept
    assert sorted(stats.prefills for _, stats in told) == list(range(1, 25))
    assert totals.prefills == 24
    assert totals.prompts == sum(len(stats.visual) for _, stats in told) == 36
    assert totals.visual == sum(sum(stats.visual) for _, stats in told)
    for name in ("prefill_flops", "scoring_flops", "prefill_flops_dense", "kv_bytes", "kv_bytes_dense"):
        assert getattr(totals, name) == pytest.approx(sum(getattr(stats, name) for _, stats in told))
    active = sum(stats.avg_tokens * len(stats.visual) for _, stats in told)
    assert totals.avg_tokens == pytest.approx(active / 36)


def test_who_is_told(few: Tiny) -> None:
    """Each as often as it has asked for, until it says that it is enough; also of forwards inside of a callback."""
    given, told = few.inputs([few.prompt(3, 5, few.grid, 5)]), Counter[str]()

    def twice(stats: Stats) -> None:
        told["twice"] += 1

    def nested(stats: Stats) -> None:
        told["nested"] += 1
        if told["nested"] == 1:
            few.model(**given)

    with enable(few, FEW) as handle:
        ends = [handle.on_prefill(twice), handle.on_prefill(twice), handle.on_prefill(nested)]
        few.model(**given)
        assert told == {"twice": 4, "nested": 2}
        assert handle.totals().prefills == 2
        for _ in range(2):
            ends[0]()
        few.model(**given)
        assert told == {"twice": 5, "nested": 3}
        ends[1]()
        ends[2]()
        few.model(**given)
        assert told == {"twice": 5, "nested": 3}
        assert handle.totals().prefills == 4
