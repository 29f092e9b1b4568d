"""Caches that are static, quantised or offloaded: routed as dynamic ones are, and stored as they store."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import cache_kinds
import models
import pytest
import torch
from cut_short import ended, raising, refused
from models import CACHE, TRANSFORMERS, Sample, Tiny
from oracle import Rules, predict
from support import FEW, RULES, NoWaiting, cache_of, close, enable, generate, inside, new_tokens, same_decisions, small
from transformers import StaticCache
from transformers.cache_utils import QuantizedCache

import reroute
from reroute.errors import RerouteError, UnsupportedCacheError
from reroute.transformers.attention import MADE_MASK
from reroute.transformers.cache import RoutedLayer

NAMES = ("llava-gqa", "qwen")
ROOM, STEPS = cache_kinds.ROOM, 4
STATIC = ("static", "offloaded static")


def _of_decoder(make: Callable[[Any], Any]) -> Callable[[Tiny], Any]:
    return lambda tiny: make(tiny.model.config.get_text_config())


KINDS = {name: _of_decoder(make) for name, make in cache_kinds.KINDS.items()}
static = KINDS["static"]


@pytest.fixture(autouse=True)
def _two_places(monkeypatch: pytest.MonkeyPatch) -> None:
    cache_kinds.offload_on_cpu(monkeypatch)


def samples_of(tiny: Tiny) -> list[Sample]:
    """One picture, two, none."""
    return [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 1, tiny.grid, 2, tiny.grid, 3), tiny.prompt(3, 9)]


def check(tiny: Tiny, samples: Sequence[Sample], rules: Rules, output: Any, prompt: int | None = None) -> None:
    length = max(map(len, samples)) if prompt is None else prompt
    for b, sample in enumerate(samples):
        tokens = new_tokens(output, length, b)
        expected = predict(tiny, sample, rules, then=tokens[:-1]).logits[-len(tokens) :]
        close(torch.stack([step[b] for step in output.logits]), expected)


def rows_of(cache: Any, kind: str) -> list[int]:
    """How many rows each layer has allocated, or stored where it does not allocate ahead."""
    if kind == "quantized":
        return [
            layer._quantized_keys[0].shape[-2] + (layer.keys.shape[-2] if layer.keys.ndim == 4 else 0)
            for layer in cache.layers
        ]
    return [layer.keys.shape[-2] for layer in cache.layers]


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_batches(name: str, kind: str, rules: Rules, attention: str) -> None:
    """A padded batch with different pictures, and tokens after it; nothing falls back to another cache."""
    tiny = models.tiny(name, attention)
    samples, cache = samples_of(tiny), KINDS[kind](tiny)
    with enable(tiny, rules) as handle:
        output = generate(tiny, samples, STEPS, **{CACHE: cache})
        trace = handle.trace
    assert cache_of(output) is cache
    check(tiny, samples, rules, output)
    same_decisions(trace, [predict(tiny, sample, rules) for sample in samples])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored(name: str, kind: str) -> None:
    """As many rows as the layers ran. Static layers have room for what they lack less, rounded up to 16 rows."""
    tiny = models.tiny(name)
    pictures: list[Any] = [tiny.grid, 1] * 4
    sample, rules = tiny.prompt(0, 5, *pictures, 3), RULES[0]
    with enable(tiny, rules) as handle:
        output = generate(tiny, [sample], STEPS, **{CACHE: KINDS[kind](tiny)})
        stats = handle.stats()
    tokens = new_tokens(output, len(sample))
    kept = predict(tiny, sample, rules, then=tokens[:-1]).kv_lengths
    length = len(sample) + STEPS - 1
    allocated = [-(-(ROOM - (length - rows)) // 16) * 16 for rows in kept] if kind in STATIC else kept
    assert len(set(allocated)) > 2
    assert rows_of(cache_of(output), kind) == allocated
    assert cache_of(output).get_seq_length() == length
    at_the_prefill = [rows - (STEPS - 1) for rows in kept]
    assert list(stats.layer_lengths) == at_the_prefill
    text = tiny.model.config.get_text_config()
    row = 2 * 4 * text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    assert stats.kv_bytes == row * sum(allocated if kind in STATIC else at_the_prefill)
    assert stats.kv_bytes_dense == row * tiny.num_layers * (ROOM if kind in STATIC else len(sample))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_later_turns(name: str, kind: str, side: str) -> None:
    """Text, another picture, and text, each on what the earlier ones left; a copy goes on like the cache."""
    tiny, rules, cache = models.tiny(name), RULES[1], None
    first = [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 2, tiny.grid, 3)]
    turns = [[tiny.prompt(s + b, *parts) for b in range(2)] for s, parts in ((10, (3,)), (20, (1, tiny.grid, 4)))]
    turns.append([tiny.prompt(30 + b, 1) for b in range(2)])
    cache = KINDS[kind](tiny)
    before, said = first, [[sample] for sample in first]
    given = tiny.inputs(first, side, positions=True)
    with enable(tiny, rules):
        tiny.model(**given, **{CACHE: cache})
        for new in turns:
            mask = torch.cat([given["attention_mask"], torch.ones(2, len(new[0]), dtype=torch.long)], 1)
            given = {**tiny.follow(before, new, side), "attention_mask": mask}
            if kind == "static":
                other = copy.deepcopy(cache) if len(new[0]) > 3 else pickle.loads(pickle.dumps(cache))
                copied = tiny.model(**given, **{CACHE: other}).logits
            logits = tiny.model(**given, **{CACHE: cache}).logits
            assert kind != "static" or torch.equal(copied, logits)
            said = [[*row, one] for row, one in zip(said, new, strict=True)]
            before = [a + b for a, b in zip(before, new, strict=True)]
            for row, its in zip(logits, said, strict=True):
                close(row, predict(tiny, its, rules).logits[-len(new[0]) :])


@pytest.mark.parametrize("kind", KINDS)
def test_beams(kind: str) -> None:
    """Rows move with their samples."""
    tiny, rules = models.tiny("llava-gqa"), RULES[0]
    samples = samples_of(tiny)[:2]
    if kind == "quantized" and TRANSFORMERS < (5, 24):
        pytest.skip("this release of Transformers does not reorder what is quantised")
    settings = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0}
    if TRANSFORMERS < (5, 19):
        samples = [samples[0]]
    with enable(tiny, rules):
        expected = generate(tiny, samples, STEPS, **settings)
        output = generate(tiny, samples, STEPS, **settings, **{CACHE: KINDS[kind](tiny)})
    assert torch.equal(output.sequences, expected.sequences)
    close(output.sequences_scores, expected.sequences_scores)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_cache_that_is_emptied(name: str, kind: str) -> None:
    tiny, rules, cache = models.tiny(name), RULES[0], None
    cache = KINDS[kind](tiny)
    for sample in samples_of(tiny)[:2]:
        with enable(tiny, rules):
            check(tiny, [sample], rules, generate(tiny, [sample], STEPS, **{CACHE: cache}))
        cache.reset()
        assert not any(isinstance(layer, RoutedLayer) for layer in cache.layers)
        assert cache.get_max_length() == (ROOM if kind in STATIC else -1)
    plain = generate(tiny, [sample], STEPS)
    assert torch.equal(generate(tiny, [sample], STEPS, **{CACHE: cache}).sequences, plain.sequences)


def refused_by_all(few: Tiny, cache: Any, before: Sample) -> None:
    if not cache.offloading:
        refused(few, cache, before)
        return
    with pytest.raises(UnsupportedCacheError, match="half filled"):  # and Transformers may have brought a layer back
        few.model(**few.follow([before], [few.prompt(9, 3)]), **{CACHE: cache})


@pytest.mark.parametrize("layer", [0, 1, 2, 4])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_a_prompt_that_was_cut_short(family: str, kind: str, layer: int, after: bool) -> None:
    """What is half filled is refused; emptied, or if nothing was stored, it has the room that it had."""
    few = small(family)
    sample, cache = few.prompt(0, 5, few.grid, 4), KINDS[kind](few)
    given = few.inputs([sample], positions=True)
    attention = few.model.model.language_model.layers[layer].self_attn
    with enable(few, FEW) as handle:
        with inside(attention, raising(), after=after):
            ended(KeyboardInterrupt, lambda: few.model(**given, **{CACHE: cache}))
        if layer or after:
            refused_by_all(few, cache, sample)
            handle.disable()
            refused_by_all(few, cache, sample)
            cache.reset()
    assert cache.get_max_length() == (ROOM if kind in STATIC else -1)
    with enable(few, FEW):
        logits = few.model(**given, **{CACHE: cache}).logits
    close(logits[0], predict(few, sample, FEW).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_without_routing(kind: str) -> None:
    """A routed cache says whose it is."""
    tiny = models.tiny("llava-gqa")
    sample, cache = samples_of(tiny)[0], KINDS[kind](tiny)
    with enable(tiny, RULES[0]):
        tiny.model(**tiny.inputs([sample]), **{CACHE: cache})
    with pytest.raises(UnsupportedCacheError, match="filled while routing was on"):
        tiny.model(**tiny.follow([sample], [tiny.prompt(1, 1)]), **{CACHE: cache})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_tokens_that_are_taken_back(name: str, kind: str) -> None:
    """Where layers can give tokens back at all."""
    tiny, rules, cache = models.tiny(name), RULES[0], None
    sample, wrong, new = tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(8, 3), tiny.prompt(9, 2)
    cache = KINDS[kind](tiny)
    with enable(tiny, rules):
        tiny.model(**tiny.inputs([sample], positions=True), **{CACHE: cache})
        tiny.model(**tiny.follow([sample], [wrong]), **{CACHE: cache})
        if kind == "quantized" or (kind in STATIC and TRANSFORMERS < (5, 24)):
            with pytest.raises(UnsupportedCacheError, match="cannot give tokens back"):
                cache.crop(-3)
            return
        for count in (-8, 1):
            with pytest.raises(UnsupportedCacheError, match="Cannot crop"):
                cache.crop(count)
        cache.crop(-3)
        logits = tiny.model(**tiny.follow([sample], [new]), **{CACHE: cache}).logits
    close(logits[0], predict(tiny, [sample, new], rules).logits[-2:])


@pytest.mark.parametrize("kind", KINDS)
def test_choosing_again(kind: str) -> None:
    """A later turn of ``reopens=True`` is a fresh prompt of the conversation."""
    tiny, rules = models.tiny("llava-gqa"), RULES[0]
    first, new = tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(9, 5)
    cache = KINDS[kind](tiny)
    with enable(tiny, rules, reopens=True):
        tiny.model(**tiny.inputs([first], positions=True), **{CACHE: cache})
        logits = tiny.model(**tiny.follow([first], [new]), **{CACHE: cache}).logits
        step = tiny.model(**tiny.follow([first + new], [tiny.prompt(3, 1)]), **{CACHE: cache}).logits
    close(logits[0], predict(tiny, first + new, rules).logits[-5:])
    close(step[0], predict(tiny, [first + new, tiny.prompt(3, 1)], rules).logits[-1:])


def test_choosing_again_behind_quantised_text() -> None:
    tiny = models.tiny("llava-gqa")
    words, picture, new = tiny.prompt(1, 6), tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(9, 5)
    for kind in ("quantized", "static"):
        cache = KINDS[kind](tiny)
        with enable(tiny, RULES[0], reopens=True):
            tiny.model(**tiny.inputs([words], positions=True), **{CACHE: cache})
            tiny.model(**tiny.follow([words], [picture]), **{CACHE: cache})
            follow = tiny.follow([words + picture], [new])
            if kind == "quantized":
                with pytest.raises(UnsupportedCacheError, match="this cache has quantised them"):
                    tiny.model(**follow, **{CACHE: cache})
            else:
                logits = tiny.model(**follow, **{CACHE: cache}).logits
                close(logits[0], predict(tiny, [words, picture + new], RULES[0]).logits[-5:])


# --- static -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_generate_makes_it(name: str, attention: str) -> None:
    """``cache_implementation="static"``: with padding, whose masks generate makes ahead, and without."""
    tiny, rules = models.tiny(name, attention), RULES[0]
    for samples in (samples_of(tiny), samples_of(tiny)[:1]):
        with enable(tiny, rules):
            output = generate(tiny, samples, STEPS, cache_implementation="static", disable_compile=True)
        assert type(cache_of(output)) is StaticCache
        check(tiny, samples, rules, output)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_steps_do_not_wait(attention: str) -> None:
    """What a static layer counts stays on the device, and routing does not ask for it."""
    tiny = models.tiny("llava-gqa", attention)
    sample, cache = samples_of(tiny)[0], static(tiny)
    with enable(tiny, RULES[0]), torch.no_grad():
        tiny.model(**tiny.inputs([sample]), **{CACHE: cache})
        step = {"input_ids": torch.tensor([[5]]), "position_ids": torch.tensor([[len(sample)]])}
        with NoWaiting():
            logits = tiny.model(**step, **{CACHE: cache}).logits
    close(logits[0], predict(tiny, [sample, models.text(5)], RULES[0]).logits[-1:])


def test_what_generate_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt's padding, where masks are made ahead; steps have no plan, and what compiled ones get is compiled."""
    tiny = models.llava(layers=3)
    seen: list[Any] = []
    prepare = tiny.model.prepare_inputs_for_generation

    def watched(*args: Any, **kwargs: Any) -> Any:
        inputs = prepare_routed(*args, **kwargs)
        seen.append(inputs.get(MADE_MASK))
        return inputs

    with enable(tiny, Rules((1,), (0.5,))):
        prepare_routed = tiny.model.prepare_inputs_for_generation
        assert prepare_routed != prepare
        monkeypatch.setattr(tiny.model, "prepare_inputs_for_generation", watched)
        samples = samples_of(tiny)
        generate(tiny, samples, STEPS, cache_implementation="static", disable_compile=True)
        monkeypatch.undo()
    made, *steps = seen
    assert made.is_causal
    assert torch.equal(made.padding, tiny.inputs(samples)["attention_mask"])
    assert steps == [None] * (STEPS - 1)


def test_layers_that_were_allocated_before() -> None:
    """They keep their buffers, whose addresses graphs know, and all of their room."""
    tiny, rules, cache = models.tiny("llava-gqa"), RULES[0], None
    cache, sample = static(tiny), samples_of(tiny)[0]
    cache.early_initialization(1, 2, 16, torch.float32, torch.device("cpu"))
    held = [layer.keys for layer in cache.layers]
    with enable(tiny, rules):
        output = generate(tiny, [sample], STEPS, **{CACHE: cache})
    check(tiny, [sample], rules, output)
    assert all(layer.keys is keys for layer, keys in zip(cache.layers, held, strict=True))


@pytest.mark.parametrize(
    ("name", "why"),
    [("flash_attention_2", "tells the rows of a static cache by their number"), ("flex_attention", "a row too many")],
)
def test_attention_that_cannot(monkeypatch: pytest.MonkeyPatch, name: str, why: str) -> None:
    tiny = models.tiny("llava-gqa")
    given = tiny.inputs([samples_of(tiny)[0]])
    with enable(tiny, RULES[0]):
        cache = static(tiny)
        tiny.model(**given, **{CACHE: cache})
        step = tiny.follow([samples_of(tiny)[0]], [tiny.prompt(1, 1)])
        monkeypatch.setattr(tiny.model.config.get_text_config(), "_attn_implementation", name)
        for arguments in ({**given, CACHE: static(tiny)}, {**step, CACHE: cache}):
            with pytest.raises(UnsupportedCacheError, match=why):
                tiny.model(**arguments)


# --- quantised ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(TRANSFORMERS < (5, 24), reason="this release of Transformers has no fp8 cache")
@pytest.mark.parametrize("name", NAMES)
def test_fp8(name: str) -> None:
    """Transformers' own: one row in eight bits. It differs from the oracle as little as the plain model's does."""
    tiny, rules = models.tiny(name), Rules((2, 4), (0.5, 0.25))
    sample = samples_of(tiny)[0]
    settings: dict[str, Any] = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    exact, rough = generate(tiny, [sample], 1 + STEPS), generate(tiny, [sample], 1 + STEPS, **settings)
    usual = max(float((a - b).abs().max()) for a, b in zip(exact.logits[:2], rough.logits[:2], strict=True))
    assert 0 < usual < 1
    with enable(tiny, rules) as handle:
        output = generate(tiny, [sample], 2, **settings)
        stats = handle.stats()
        plain = reroute.Schedule((2,), (1.0,))
        with handle.at(schedule=plain):
            generate(tiny, [sample], 2, **settings)
            dense = handle.stats()
    assert isinstance(cache_of(output), QuantizedCache)
    tokens = new_tokens(output, len(sample))
    expected = predict(tiny, sample, rules, then=tokens[:-1]).logits[-2:]
    close(output.logits[0][0], expected[0])
    assert float((output.logits[1][0] - expected[1]).abs().max()) < 3 * usual
    scales = 2 * 4 * tiny.num_layers
    assert stats.kv_bytes < dense.kv_bytes == stats.kv_bytes_dense + scales


def test_caches_of_other_kinds() -> None:
    tiny = models.tiny("llava-gqa")
    given = tiny.inputs([samples_of(tiny)[0]])
    static_window = static(tiny)
    from transformers.cache_utils import StaticSlidingWindowLayer

    static_window.layers[5] = StaticSlidingWindowLayer(max_cache_len=ROOM, sliding_window=8)
    with enable(tiny, RULES[0]), pytest.raises(RerouteError, match="StaticSlidingWindowLayer cannot"):
        tiny.model(**given, **{CACHE: static_window})
