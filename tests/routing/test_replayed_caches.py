"""What comes after a replayed prefill goes on as after an eager one, and nothing of a graph is left in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from models import CACHE, TRANSFORMERS, Sample, Tiny
from oracle import Rules
from replays import capture, replayed, route, same_caches, same_outputs
from support import RULES, assistant_model, cache_of, close, generate, mixed_batch, tiny_models
from torch import Tensor
from transformers import DynamicCache
from turns import turn

from reroute.core.cost import ModelShape, prefill_cost

pytestmark = pytest.mark.usefixtures("tapes")
tiny = tiny_models("llava-gqa", "qwen")

ROUTE_AND_REMOVE = [RULES[0], RULES[2]]


def prompts(tiny: Tiny) -> list[Sample]:
    return [tiny.prompt(3, 4, tiny.grid, 2, tiny.grid, 6), tiny.prompt(4, 9, tiny.grid, 3), tiny.prompt(5, 2)]


def beside(tiny: Tiny, rules: Rules, samples: list[Sample], run: Callable[[list[Sample]], Any]) -> tuple[Any, Any]:
    """What ``run`` gives for ``samples``, by a graph that was captured for other prompts, and eagerly."""
    with route(tiny, rules) as handle:
        for _ in range(2):
            run(mixed_batch(tiny)[: len(samples)])
        before = handle.totals().prefills
        mine = run(samples)
        assert handle.totals().prefills == before + 1
        assert handle.stats().graph.is_replayed, handle.stats().graph
        assert handle.stats().graph.graphs == 1
    with route(tiny, rules, graphs=False):
        return mine, run(samples)


@pytest.mark.parametrize("rules", ROUTE_AND_REMOVE)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2, "early_stopping": True}],
    ids=["greedy", "beams", "several beams"],
)
def test_generation(tiny: Tiny, rules: Rules, batch: int, settings: dict[str, Any]) -> None:
    if settings and tiny.is_qwen and TRANSFORMERS < (5, 19):
        pytest.skip("Transformers gives beams of such prompts the wrong pictures")
    mine, eager = beside(tiny, rules, prompts(tiny)[:batch], lambda samples: generate(tiny, samples, **settings))
    assert torch.equal(mine.sequences, eager.sequences)
    for its, other in zip(mine.logits, eager.logits, strict=True):
        close(its, other)


@pytest.mark.parametrize("rules", ROUTE_AND_REMOVE)
def test_assisted_generation(tiny: Tiny, rules: Rules) -> None:
    """Drafts come with the prompt, and do not rank; those that are wrong are cropped."""
    seen, sample = (
        tiny.prompt(seed, 2, tiny.grid, 1) + words + tiny.prompt(seed + 20, 3) + words
        for seed in (1, 2)
        for words in [tiny.prompt(seed + 30, 4)]
    )
    with route(tiny, rules) as handle:
        for each in (seen, seen, sample):
            mine = generate(tiny, [each], 8, prompt_lookup_num_tokens=3)
        assert handle.stats().graph.is_replayed, handle.stats().graph
    with route(tiny, rules, graphs=False):
        eager = generate(tiny, [sample], 8)
    assert torch.equal(mine.sequences, eager.sequences)


@pytest.mark.parametrize("rules", ROUTE_AND_REMOVE)
def test_an_assistant_model(rules: Rules) -> None:
    """Its drafts come after the prompt, and are cropped from what a replay has filled."""
    if TRANSFORMERS < (5, 18):
        pytest.skip("Transformers hands the assistant the picture")
    tiny, assistant = models.tiny("llava-gqa"), assistant_model()
    samples = [prompts(tiny)[0]]
    mine, eager = beside(tiny, rules, samples, lambda its: generate(tiny, its, 8, assistant_model=assistant))
    assert torch.equal(mine.sequences, eager.sequences)
    with route(tiny, rules, graphs=False):
        assert torch.equal(mine.sequences, generate(tiny, samples, 8).sequences)


def test_renumbered_positions_go_on() -> None:
    tiny = models.tiny("llava-gqa")
    rules = Rules((2, 4), (0.5, 0.25), "remove", position_mode="renumbered")
    for batch in (1, 3):
        mine, eager = beside(tiny, rules, prompts(tiny)[:batch], lambda samples: generate(tiny, samples))
        for its, other in zip(mine.logits, eager.logits, strict=True):
            close(its, other)


@pytest.mark.parametrize("rules", ROUTE_AND_REMOVE)
@pytest.mark.parametrize("side", ["left", "right"])
def test_later_turns(tiny: Tiny, rules: Rules, side: str) -> None:
    """Two of them, and what is cropped between; right padding stays between prompt and turn."""
    samples, new = prompts(tiny), [tiny.prompt(20 + b, 3) for b in range(3)]
    inputs = tiny.inputs(samples, side, positions=True)

    def run() -> tuple[Any, Tensor, Tensor]:
        cache = cache_of(tiny.model(**inputs, use_cache=True))
        first = turn(tiny, cache, samples, new, side)
        cache.crop(-3)
        return cache, first, turn(tiny, cache, samples, new, side)

    with route(tiny, rules) as handle:
        capture(tiny, mixed_batch(tiny))
        cache, *mine = run()
        assert handle.stats().graph.is_replayed
        assert handle.totals().prefills == 3
    with route(tiny, rules, graphs=False):
        eager_cache, *eager = run()
    for its, other in zip(mine, eager, strict=True):
        close(its, other)
    valid = torch.cat([inputs["attention_mask"], torch.ones(3, 3, dtype=torch.long)], 1).bool()
    same_caches(cache, eager_cache, valid)


def tensors(value: Any) -> Iterator[Tensor]:
    """All that can be reached from the layers of a cache."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif hasattr(value, "__dict__"):
        yield from tensors(vars(value))


def padded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """One prompt with padding before it, as a multiple of some number asks for."""
    per_token = inputs["input_ids"].shape
    return {name: F.pad(its, (4, 0)) if its.shape == per_token else its for name, its in inputs.items()}


@pytest.mark.parametrize("kind", ["one", "one, padded", "a batch"])
def test_nothing_is_a_view_of_static_memory(tiny: Tiny, kind: str) -> None:
    rules = [*ROUTE_AND_REMOVE, Rules((2,), (1.0,))]
    if not tiny.is_qwen:
        rules.append(Rules((2, 4), (0.5, 0.25), "remove", position_mode="renumbered"))
    batch = 3 if kind == "a batch" else 1
    inputs = tiny.inputs(prompts(tiny)[:batch])
    inputs = padded(inputs) if kind == "one, padded" else inputs
    for its in rules:
        with route(tiny, its, graphs=False):
            eager = tiny.model(**inputs)
        with route(tiny, its) as handle:
            capture(tiny, mixed_batch(tiny)[:batch])
            output = replayed(handle, tiny, inputs)
            static = handle._router._replays._arena.memory.untyped_storage().data_ptr()
            held = [output.logits, *tensors(cache_of(output).layers)]
            assert len(held) > 2 * tiny.num_layers
            assert all(t.untyped_storage().data_ptr() != static for t in held)
            before = [t.clone() for t in held]
            replayed(handle, tiny, tiny.inputs(mixed_batch(tiny)[:batch]))
            assert all(map(torch.equal, held, before))
        same_outputs(output, eager, inputs["attention_mask"].bool())


@pytest.mark.parametrize("rules", [Rules((2,), (1.0,)), Rules((2,), (0.5,))])
def test_few_layers_share_memory(rules: Rules) -> None:
    """It is held until each of them has grown, in the first decoding step."""
    tiny = models.llava(layers=20)
    inputs = tiny.inputs(prompts(tiny)[:1])
    with route(tiny, rules, graphs=False):
        eager = tiny.model(**inputs)
    with route(tiny, rules) as handle:
        capture(tiny, mixed_batch(tiny)[:1])
        output = replayed(handle, tiny, inputs)
    same_outputs(output, eager, inputs["attention_mask"].bool())
    sharing = Counter(layer.keys.untyped_storage().data_ptr() for layer in cache_of(output).layers)
    assert max(sharing.values()) == 8


def test_a_cache_of_the_callers_is_filled(tiny: Tiny) -> None:
    inputs = tiny.inputs(prompts(tiny)[:1])
    for cache in (DynamicCache(config=tiny.model.config.get_text_config()), DynamicCache()):
        with route(tiny, RULES[0]) as handle:
            capture(tiny, mixed_batch(tiny)[:1])
            output = replayed(handle, tiny, inputs, **{CACHE: cache})
            assert cache_of(output) is cache
            assert cache.get_seq_length() == inputs["input_ids"].shape[1]
            kv_bytes = handle.stats().kv_bytes
        assert kv_bytes == sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))


def test_without_a_cache(tiny: Tiny) -> None:
    inputs = tiny.inputs(prompts(tiny)[:1])
    with route(tiny, RULES[0]) as handle:
        capture(tiny, mixed_batch(tiny)[:1])
        expected = replayed(handle, tiny, inputs).logits
        output = replayed(handle, tiny, inputs, use_cache=False)
        assert handle.stats().kv_bytes == 0
    assert cache_of(output) is None
    assert torch.equal(output.logits, expected)


def test_statistics_are_those_of_an_eager_prefill_but_for_fillers(tiny: Tiny) -> None:
    """FLOPs count the rows of the class."""
    samples = prompts(tiny)
    inputs = tiny.inputs(samples)
    with route(tiny, RULES[0]) as handle:
        capture(tiny, mixed_batch(tiny))
        replayed(handle, tiny, inputs)
        mine, totals = handle.stats(), handle.totals()
        seen: list[Any] = []
        handle.on_prefill(seen.append)
        tiny.model(**inputs)
        assert seen == [handle.stats()]
    with route(tiny, RULES[0], graphs=False) as handle:
        tiny.model(**inputs)
        eager = handle.stats()
    for name in ("visual", "kept", "avg_tokens", "keep", "kv_bytes", "kv_bytes_dense", "layer_lengths", "layers"):
        assert getattr(mine, name) == getattr(eager, name), name
    assert mine.prefill_flops_dense == eager.prefill_flops_dense
    shape = ModelShape.from_config(tiny.model.config.get_text_config())
    layers = prefill_cost(shape, [64] * tiny.num_layers, batch=len(samples))
    assert mine.prefill_flops - mine.scoring_flops == layers.prefill_flops > eager.prefill_flops
    assert mine.scoring_flops > eager.scoring_flops
    assert totals.prefills == mine.prefills == 3
    assert eager.graph is None
    assert "replayed a graph" in str(mine)
