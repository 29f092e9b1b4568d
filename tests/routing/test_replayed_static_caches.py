"""Prefills that are replayed into static caches: what steps find there is what eager prefills leave there."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import models
import pytest
import torch
from models import CACHE, Sample, Tiny
from oracle import Rules, predict
from replays import GRAPHS, capture, replayed, route, same_caches, same_outputs
from support import RULES, cache_of, close, generate, mixed_batch, tiny_models
from tape import Tape
from torch import Tensor
from transformers import StaticCache
from turns import turn

from reroute.transformers.attention import MADE_MASK, MadeMask

pytestmark = pytest.mark.usefixtures("tapes")
tiny = tiny_models("llava-gqa", "qwen")

DENSE = Rules((2,), (1.0,))
ROOM = 100
STATIC: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True}


def prompts(tiny: Tiny) -> list[Sample]:
    return [tiny.prompt(3, 4, tiny.grid, 2, tiny.grid, 6), tiny.prompt(4, 9, tiny.grid, 3), tiny.prompt(5, 2)]


def static(tiny: Tiny) -> Any:
    return StaticCache(config=tiny.model.config.get_text_config(), max_cache_len=ROOM)


@pytest.mark.parametrize("rules", [RULES[0], RULES[2], DENSE], ids=["route", "remove", "dense"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generation(tiny: Tiny, rules: Rules, batch: int, settings: dict[str, Any]) -> None:
    """The masks that ``generate`` makes ahead for static caches are no masks of a caller's own."""
    if settings and tiny.is_qwen and models.TRANSFORMERS < (5, 19):
        pytest.skip("Transformers gives beams of such prompts the wrong pictures")
    inputs = tiny.inputs(prompts(tiny)[:batch])
    with route(tiny, rules) as handle:
        for _ in range(2):
            generate(tiny, mixed_batch(tiny)[:batch], **STATIC, **settings)
        mine = generate(tiny, inputs, **STATIC, **settings)
        assert handle.stats().graph.is_replayed, handle.stats().graph
        assert handle.stats().graph.graphs == 1
    with route(tiny, rules, graphs=False):
        eager = generate(tiny, inputs, **STATIC, **settings)
    assert torch.equal(mine.sequences, eager.sequences)
    for its, other in zip(mine.logits, eager.logits, strict=True):
        close(its, other)
    if not settings:
        steps = torch.ones(batch, len(mine.logits) - 1, dtype=torch.long)
        valid = torch.cat([inputs["attention_mask"], steps], 1).bool()
        same_caches(cache_of(mine), cache_of(eager), valid)


@pytest.mark.parametrize("rules", [RULES[0], RULES[2], DENSE], ids=["route", "remove", "dense"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cache_of_the_callers_and_later_turns(tiny: Tiny, rules: Rules, side: str) -> None:
    """It is as after an eager prefill, and so are the turns. Layers hold copies, each in memory of its own."""
    samples, new = prompts(tiny), [tiny.prompt(20 + b, 3) for b in range(3)]
    inputs = tiny.inputs(samples, side, positions=True)
    valid = inputs["attention_mask"].bool()
    with route(tiny, rules) as handle:
        capture(tiny, mixed_batch(tiny))
        cache = static(tiny)
        output = replayed(handle, tiny, inputs, **{CACHE: cache})
        assert cache_of(output) is cache
        kv_bytes = handle.stats().kv_bytes
        arena = handle._router._replays._arena.memory.untyped_storage().data_ptr()
        held = [its for layer in cache.layers for its in (layer.keys, layer.values)]
        assert kv_bytes == sum(its.nbytes for its in held)
        assert len({its.untyped_storage().data_ptr() for its in held} - {arena}) == len(held)
    with route(tiny, rules, graphs=False) as plain:
        eager = tiny.model(**inputs, **{CACHE: static(tiny)})
        assert plain.stats().kv_bytes == kv_bytes
        same_outputs(output, eager, valid)
        mine, other = (turn(tiny, its, samples, new, side) for its in (cache, cache_of(eager)))
    close(mine, other)


def test_emptied_it_is_filled_where_it_lies(tiny: Tiny) -> None:
    """Allocated ahead or by its first prompt; what was bigger before is as good. All that a graph knows stays."""
    rules, (first, second, _) = RULES[0], prompts(tiny)
    text = tiny.model.config.get_text_config()
    heads, dim = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
    with route(tiny, rules) as handle:
        capture(tiny, [first], [second])
        for is_early in (True, False):
            cache = static(tiny)
            if is_early:
                cache.early_initialization(1, heads, dim, torch.float32, torch.device("cpu"))
            known: list[Tensor] = []
            for sample in (second, first, second):
                logits = replayed(handle, tiny, tiny.inputs([sample], positions=True), **{CACHE: cache}).logits
                close(logits[0], predict(tiny, sample, rules).logits)
                its = [t for layer in cache.layers for t in (layer.keys, layer.values, layer.cumulative_length)]
                assert not known or all(a is b for a, b in zip(its, known, strict=True))
                known = its
                close(turn(tiny, cache, [sample], [tiny.prompt(8, 2)], "left")[0], after(tiny, sample, rules))
                cache.reset()


@pytest.mark.parametrize("graphs", [False, GRAPHS], ids=["eager", "replayed"])
def test_room_of_other_stages(tiny: Tiny, graphs: Any) -> None:
    """What layers have from a prompt with other routing layers differs within a stage, and is enough."""
    pictures: list[Any] = [tiny.grid, 1] * 4
    sample, rules = tiny.prompt(0, 5, *pictures, 3), Rules((2,), (0.1,))
    cache = static(tiny)
    with route(tiny, RULES[0], graphs=False):
        tiny.model(**tiny.inputs([sample], positions=True), **{CACHE: cache})
    had = [layer.keys.shape[-2] for layer in cache.layers]
    assert len(set(had[2:])) > 1
    cache.reset()
    with route(tiny, rules, graphs=graphs) as handle:
        if graphs:
            capture(tiny, [sample])
        output = tiny.model(**tiny.inputs([sample], positions=True), **{CACHE: cache})
        assert not graphs or handle.stats().graph.is_replayed
        assert [layer.keys.shape[-2] for layer in cache.layers] == had
        close(output.logits[0], predict(tiny, sample, rules).logits)
        close(turn(tiny, cache, [sample], [tiny.prompt(8, 2)], "left")[0], after(tiny, sample, rules))


def after(tiny: Tiny, sample: Sample, rules: Rules) -> Tensor:
    return predict(tiny, [sample, tiny.prompt(8, 2)], rules).logits[-2:]


def test_in_inference_mode_and_out_of_it() -> None:
    """What was allocated inside cannot be written outside, and is given up."""
    tiny, rules = models.tiny("llava-gqa"), RULES[0]
    sample = prompts(tiny)[0]
    with torch.inference_mode():
        cache = static(tiny)
        with route(tiny, rules, graphs=False):
            tiny.model(**tiny.inputs([sample]), **{CACHE: cache})
    with route(tiny, rules) as handle:
        capture(tiny, [sample])
        for inside in (nullcontext, torch.inference_mode, nullcontext):
            cache.reset()
            with inside():
                for its in (cache, static(tiny)):
                    logits = replayed(handle, tiny, tiny.inputs([sample]), **{CACHE: its}).logits
                    close(logits[0], predict(tiny, sample, rules).logits)
                    step = tiny.follow([sample], [tiny.prompt(8, 2)])
                    close(tiny.model(**step, **{CACHE: its}).logits[0], after(tiny, sample, rules))


def test_too_little_room(tapes: list[Tape]) -> None:
    """An error, as where a static cache is filled by layers."""
    tiny = models.tiny("llava-gqa")
    sample = prompts(tiny)[0]
    with route(tiny, RULES[0]):
        capture(tiny, [sample])
        cache = StaticCache(config=tiny.model.config.get_text_config(), max_cache_len=len(sample) - 1)
        with pytest.raises(RuntimeError, match="size"):
            tiny.model(**tiny.inputs([sample]), **{CACHE: cache})
    assert len(tapes) == 1


def test_masks_and_memory_of_ones_own_run_eagerly() -> None:
    """A 4-D mask that ``generate`` has not made; layers that were allocated in inference mode, or for other dtypes."""
    tiny = models.tiny("llava-gqa")
    sample = prompts(tiny)[0]
    inputs = tiny.inputs([sample], positions=True)
    with route(tiny, DENSE) as handle:
        capture(tiny, [sample])
        mask = torch.ones(1, 1, len(sample), ROOM, dtype=torch.bool).tril()
        for moved in (
            {},
            {MADE_MASK: MadeMask(mask.clone(), True)},
        ):  # as where generate has brought it to another device
            tiny.model(**{**inputs, "attention_mask": mask}, **{CACHE: static(tiny)}, **moved)
            assert "a mask of its own" in handle.stats().graph.why
        with torch.inference_mode():
            cache = static(tiny)
            cache.early_initialization(1, 2, 16, torch.float32, torch.device("cpu"))
            logits = tiny.model(**inputs, **{CACHE: cache}).logits
            assert "not an empty DynamicCache or StaticCache" in handle.stats().graph.why
            close(logits[0], predict(tiny, sample, DENSE).logits)
        cache = static(tiny)
        cache.early_initialization(1, 2, 16, torch.float64, torch.device("cpu"))
        with pytest.raises(RuntimeError, match="dtype"):
            tiny.model(**inputs, **{CACHE: cache})
