"""Graphs of a device take turns, share its memory, and leave when they are not used."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import models
import pytest
import torch
from models import Sample, Tiny
from oracle import Rules
from replays import capture, eagerly, replayed, route, same_outputs
from support import RULES, cache_of, close, generate, mixed_batch, schedule, tiny_models
from tape import Tape

import reroute

tiny = tiny_models("llava-gqa", "qwen")
OTHER = Rules((1, 4), (0.4, 0.2))


def some(tiny: Tiny, count: int) -> list[Sample]:
    return [tiny.prompt(40 + i, 2 + i % 5, tiny.grid, 3 + i % 7) for i in range(count)]


@pytest.mark.usefixtures("tapes", "_hasty")
def test_threads_have_their_own_results(tiny: Tiny) -> None:
    """Prompts alone and in pairs, by one model that changes settings between, and by another one."""
    other = models.llava(seed=5)
    jobs: list[tuple[Tiny, list[Sample], Rules]] = []
    for i, sample in enumerate(some(tiny, 12)):
        jobs.append((tiny, [sample], RULES[0] if i % 2 else OTHER))
        jobs.append((other, [other.prompt(i, 3, other.grid, 1 + i)] * (1 + i % 2), RULES[0]))
    expected = []
    for its, samples, rules in jobs:
        with route(its, rules, graphs=False):
            expected.append(its.model(**its.inputs(samples)))

    with route(tiny, RULES[0]) as handle, route(other, RULES[0]) as second:

        def run(job: tuple[Tiny, list[Sample], Rules]) -> Any:
            its, samples, rules = job
            if rules is RULES[0]:
                return its.model(**its.inputs(samples))
            with handle.at(schedule=schedule(rules)):
                return its.model(**its.inputs(samples))

        for job in jobs[:4]:
            run(job)
        with ThreadPoolExecutor(4) as pool:
            outputs = list(pool.map(run, jobs))
        assert handle.totals().prefills == 2 + 12
        for each in (handle, second):
            assert each.stats().graph.graphs == 2
    for output, eager, (its, samples, _) in zip(outputs, expected, jobs, strict=True):
        same_outputs(output, eager, its.inputs(samples)["attention_mask"].bool())


def test_the_graph_that_was_not_used_for_longest_leaves(tapes: list[Tape]) -> None:
    tiny = models.tiny("llava-gqa")
    sizes = [some(tiny, 3)[:count] for count in (3, 2, 1)]
    with route(tiny, RULES[0], graphs=reroute.Graphs(max_graphs=2, max_waste=10)) as handle:

        def is_replayed(samples: Sequence[Sample]) -> bool:
            tiny.model(**tiny.inputs(samples))
            return bool(handle.stats().graph.is_replayed)

        capture(tiny, *sizes[:2])
        assert is_replayed(sizes[0])
        capture(tiny, sizes[2])
        assert handle.stats().graph.graphs == 2
        assert len(tapes) == 3
        assert is_replayed(sizes[0])
        assert is_replayed(sizes[2])
        assert len(tapes) == 3
        assert is_replayed(sizes[1])  # captured once more: it has been seen before
        assert len(tapes) == 4
        assert handle.stats().graph.graphs == 2


@pytest.mark.usefixtures("tapes")
def test_graphs_share_one_memory(tiny: Tiny) -> None:
    large, small = some(tiny, 3), some(tiny, 1)
    inputs = [tiny.inputs(samples) for samples in (large, small)]
    with route(tiny, RULES[0]) as handle:
        capture(tiny, large)
        nbytes = handle.stats().graph.nbytes
        capture(tiny, small)
        other = models.llava(seed=3)
        with route(other, OTHER) as second:
            capture(other, [other.prompt(0, 5, other.grid, 4)])
            assert second.stats().graph.graphs == 1
            assert second.stats().graph.nbytes == nbytes
        assert handle.stats().graph.graphs == 2
        assert handle.stats().graph.nbytes == nbytes > 0
        for each in inputs * 2:  # what one leaves there is nothing to the other
            mine = replayed(handle, tiny, each)
            close(mine.logits, eagerly(tiny, handle, each))


def test_memory_that_grows_is_held_once(tiny: Tiny, tapes: list[Tape]) -> None:
    """All graphs on the device leave with what they lay in, and are captured where their next prompts find more."""
    small, large, other = some(tiny, 1), some(tiny, 3), models.llava(seed=3)
    inputs, theirs = tiny.inputs(small), other.inputs([other.prompt(0, 5, other.grid, 4)])
    with route(tiny, RULES[0]) as handle, route(other, OTHER) as second:
        for _ in range(2):
            tiny.model(**inputs)
            other.model(**theirs)
        arena = handle._router._replays._arena
        before, nbytes = weakref.ref(arena.memory.untyped_storage()), arena.nbytes
        assert (handle.stats().graph.graphs, second.stats().graph.graphs) == (1, 1)
        capture(tiny, large)
        tapes.clear()
        gc.collect()
        assert before() is None
        assert handle.stats().graph.graphs == 1
        assert second._router._replays.held == (0, arena.nbytes)
        assert arena.nbytes == arena.memory.numel() > nbytes
        for its, who, given in ((second, other, theirs), (handle, tiny, inputs), (second, other, theirs)):
            close(replayed(its, who, given).logits, eagerly(who, its, given))
        assert (handle.stats().graph.graphs, second.stats().graph.graphs) == (2, 1)


@pytest.mark.usefixtures("tapes")
def test_warm_up_captures_ahead(tiny: Tiny) -> None:
    samples = [tiny.prompt(b, 5, tiny.grid, 4) for b in range(2)]
    for rules in (RULES[0], Rules((2,), (1.0,))):
        for batch in (1, 2):
            with route(tiny, rules) as handle:
                handle.warm_up(visual=16, text=9, batch=batch)
                assert handle.stats().prefills == 0
                replayed(handle, tiny, tiny.inputs(samples[:batch]))
                assert handle.stats().graph.graphs == 1
                output = generate(tiny, samples[:batch])
                assert handle.stats().graph.is_replayed
            with route(tiny, rules, graphs=False):
                assert torch.equal(generate(tiny, samples[:batch]).sequences, output.sequences)


def test_warm_up_that_cannot(tapes: list[Tape]) -> None:
    tiny = models.tiny("llava-gqa")
    with route(tiny, RULES[0], trace=True) as handle:
        with pytest.raises(reroute.errors.RerouteError, match=r"No graph can be captured .*trace=True"):
            handle.warm_up(visual=16, text=9)
        with pytest.raises(reroute.errors.RerouteError, match="at least one visual token"):
            handle.warm_up(visual=16, text=0)
    with (
        route(tiny, RULES[0], graphs=False) as handle,
        pytest.raises(reroute.errors.RerouteError, match="captures a graph"),
    ):
        handle.warm_up(visual=16, text=9)
    assert not tapes


@pytest.mark.usefixtures("tapes")
def test_in_inference_mode_and_outside_of_it(tiny: Tiny) -> None:
    first, second = some(tiny, 2)
    with route(tiny, RULES[0]) as handle:
        with torch.inference_mode():
            capture(tiny, [first])
            inside = replayed(handle, tiny, tiny.inputs([second]))
        outside = replayed(handle, tiny, tiny.inputs([second]))
    assert torch.equal(inside.logits, outside.logits)
    assert torch.equal(cache_of(inside).layers[5].keys, cache_of(outside).layers[5].keys)


@pytest.mark.usefixtures("tapes")
def test_a_disabled_handle_holds_nothing() -> None:
    tiny = models.llava()
    model = weakref.ref(tiny.model)
    handle = route(tiny, RULES[0])
    capture(tiny, mixed_batch(tiny)[:1])
    arena = weakref.ref(handle._router._replays._arena)
    handle.disable()
    del tiny
    gc.collect()
    assert arena() is None
    assert model() is None
    assert handle.stats().prefills == 2
