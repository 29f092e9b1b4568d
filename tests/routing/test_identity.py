"""Promise 1: routing that leaves nothing out, and routing that is over, are the plain model, bit for bit."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import models
import pytest
import torch
from models import Tiny
from oracle import Rules, predict
from support import RULES, cache_of, close, enable, generate, kv_lengths, same_decisions, snapshot

import reroute
from reroute.errors import RerouteError
from reroute_kernels import PagedPool


def prompt(tiny: Tiny, seed: int = 0) -> Any:
    return tiny.prompt(seed, 4, tiny.grid, 3)


def everything(tiny: Tiny) -> list[torch.Tensor]:
    """All that a model gives back for a padded batch: logits, states, keys, values, a generation with its logits."""
    samples = [prompt(tiny), tiny.prompt(1, 2, tiny.grid, 1, tiny.grid, 4), tiny.prompt(2, 6)]
    out = tiny.model(**tiny.inputs(samples), use_cache=True, output_hidden_states=True)
    cache = cache_of(out)
    generated = generate(tiny, samples, 4)
    stored = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return [out.logits, *out.hidden_states, *stored, generated.sequences, *generated.logits]


def identical(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


# --- keep = 1 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": reroute.Schedule((0, 3), (1.0, 1.0))},
        {"schedule": reroute.Schedule((2, 3, 7), (1.0,) * 3), "action": "remove"},
        {"schedule": reroute.Schedule((3,), (1.0,), position_mode="renumbered"), "action": "remove"},
        {"method": "pdrop", "keep": 1.0},
        {"method": "fastv", "keep": 1.0, "action": "remove"},
        {"method": "random", "keep": 1.0},
    ],
    ids=str,
)
def test_keeping_everything_is_bit_identical(tiny: Tiny, settings: dict[str, Any]) -> None:
    if tiny.is_qwen and "renumbered" in str(settings):
        pytest.skip("M-RoPE positions cannot be renumbered")
    plain = everything(tiny)
    with reroute.enable(tiny.model, **settings):
        assert identical(everything(tiny), plain)


# --- after disable ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", RULES)
def test_disable_restores_the_model_exactly(tiny: Tiny, rules: Rules) -> None:
    plain = everything(tiny)
    before = snapshot(tiny.model)
    generator = type(tiny.model).generate
    handle = enable(tiny, rules)
    assert not identical(everything(tiny), plain)
    assert snapshot(tiny.model) != before
    handle.disable()
    assert snapshot(tiny.model) == before
    assert tiny.model.generate.__func__ is generator
    assert identical(everything(tiny), plain)
    handle.disable()  # idempotent
    assert snapshot(tiny.model) == before


def test_context_manager(tiny: Tiny) -> None:
    before = snapshot(tiny.model)
    with enable(tiny, RULES[0]) as handle:
        tiny.model(**tiny.inputs([prompt(tiny)]))
        assert len(handle.trace) == 3
    assert snapshot(tiny.model) == before
    with pytest.raises(ZeroDivisionError), enable(tiny, RULES[0]):
        raise ZeroDivisionError
    assert snapshot(tiny.model) == before


def test_disable_by_model(tiny: Tiny) -> None:
    before = snapshot(tiny.model)
    enable(tiny, RULES[0])
    reroute.disable(tiny.model)
    assert snapshot(tiny.model) == before
    reroute.disable(tiny.model)  # nothing to undo


def test_hooks_and_methods_of_others_survive(tiny: Tiny) -> None:
    seen = []
    layer = tiny.model.model.language_model.layers[3]
    theirs = layer.register_forward_hook(lambda *_: seen.append("hook"))
    tiny.model.generate = lambda *args, **kwargs: "theirs"
    try:
        with enable(tiny, RULES[0]):
            tiny.model(**tiny.inputs([prompt(tiny)]))
        tiny.model(**tiny.inputs([prompt(tiny)]))
        assert seen == ["hook"] * 2
        assert tiny.model.generate() == "theirs"
    finally:
        theirs.remove()
        del tiny.model.generate


# --- twice, and two models ----------------------------------------------------------------------------------------


def test_enabling_twice_replaces(tiny: Tiny) -> None:
    before = snapshot(tiny.model)
    sample = prompt(tiny)
    first = enable(tiny, RULES[0])
    second = enable(tiny, RULES[2])
    cache = cache_of(tiny.model(**tiny.inputs([sample]), use_cache=True))
    assert kv_lengths(cache) == predict(tiny, sample, RULES[2]).kv_lengths
    assert first.trace is None
    same_decisions(second.trace, [predict(tiny, sample, RULES[2])])
    first.disable()  # replaced long ago: nothing is left of it to undo
    cache = cache_of(tiny.model(**tiny.inputs([sample]), use_cache=True))
    assert kv_lengths(cache) == predict(tiny, sample, RULES[2]).kv_lengths
    second.disable()
    assert snapshot(tiny.model) == before


def test_a_refused_second_enable_leaves_the_first(tiny: Tiny) -> None:
    sample = prompt(tiny)
    handle = enable(tiny, RULES[0])
    state = snapshot(tiny.model)
    with pytest.raises(RerouteError):
        reroute.enable(tiny.model, schedule=reroute.Schedule((99,), (0.5,)))
    assert snapshot(tiny.model) == state
    tiny.model(**tiny.inputs([sample]))
    same_decisions(handle.trace, [predict(tiny, sample, RULES[0])])


def test_two_models_are_independent() -> None:
    a, b, c = (models.tiny(name) for name in models.NAMES)
    plain = everything(c)
    one, two = enable(a, RULES[0]), enable(b, RULES[2])
    for _ in range(2):
        for model, handle, rules in ((a, one, RULES[0]), (b, two, RULES[2])):
            sample = prompt(model)
            out = model.model(**model.inputs([sample]))
            expected = predict(model, sample, rules)
            close(out.logits[0], expected.logits)
            same_decisions(handle.trace, [expected])
    assert identical(everything(c), plain)
    one.disable()
    sample = prompt(b)
    close(b.model(**b.inputs([sample])).logits[0], predict(b, sample, RULES[2]).logits)


def test_one_model_in_two_threads() -> None:
    tiny = models.tiny("llava-gqa")
    samples = [tiny.prompt(seed, 3 + seed, tiny.grid, 4) for seed in range(4)]
    results: dict[int, torch.Tensor] = {}
    barrier = threading.Barrier(2)

    def work(which: int) -> None:
        with torch.no_grad():
            barrier.wait()
            for i in range(which, 4, 2):
                results[i] = tiny.model(**tiny.inputs([samples[i]])).logits[0]

    with enable(tiny, RULES[0]):
        threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, sample in enumerate(samples):
        close(results[i], predict(tiny, sample, RULES[0]).logits)


def test_a_copy_of_a_routed_model_is_a_model_of_its_own() -> None:
    tiny = models.llava()
    sample = prompt(tiny)
    with enable(tiny, RULES[0]):
        twin = Tiny(copy.deepcopy(tiny.model), tiny.grid)
        twin.model.lm_head.weight *= -1
        close(generate(twin, [sample], 1).logits[0], twin.model(**twin.inputs([sample])).logits[:, -1])
    reroute.disable(twin.model)


def test_a_handle_does_not_keep_the_model() -> None:
    """Its figures are read after ``with``; the weights are gone as soon as the model is."""
    tiny = models.llava(layers=4)
    with reroute.enable(tiny.model, keep=0.5) as handle:
        tiny.model(**tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)]))
    weights = weakref.ref(tiny.model.model.language_model)
    gc.collect()
    gc.disable()
    try:
        del tiny
        assert weights() is None
    finally:
        gc.enable()
    assert handle.stats().prefills == 1
    with pytest.raises(RerouteError, match="was disabled"):
        handle.plan(torch.zeros(1, 3, dtype=torch.int64))


def test_a_routed_model_can_be_freed() -> None:
    tiny = models.llava(layers=4)
    ref = weakref.ref(tiny.model)
    enable(tiny, Rules((1,), (0.5,)))
    tiny.model(**tiny.inputs([prompt(tiny)]))
    del tiny
    gc.collect()
    assert ref() is None


# --- exceptions ---------------------------------------------------------------------------------------------------


@contextmanager
def failing(module: Any, error: BaseException, method: str = "forward") -> Iterator[None]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    setattr(module, method, fail)
    try:
        yield
    finally:
        delattr(module, method)


def part(tiny: Tiny, where: str) -> Any:
    base = tiny.model.model
    places: dict[str, Callable[[], Any]] = {
        "vision tower": lambda: base.visual if tiny.is_qwen else base.vision_tower,
        "first layer": lambda: base.language_model.layers[0].mlp,
        "scoring": lambda: base.language_model.layers[2].self_attn.k_proj,
        "layer of the first stage": lambda: base.language_model.layers[3].mlp,
        "last layer": lambda: base.language_model.layers[-1].self_attn,
        "final norm": lambda: base.language_model.norm,
        "head": lambda: tiny.model.lm_head,
    }
    return places[where]()


WHERE = ("vision tower", "first layer", "scoring", "layer of the first stage", "last layer", "final norm", "head")


def check_recovery(tiny: Tiny, handle: Any) -> None:
    """Another prompt, without a picture, and then the failed one: as if nothing had happened."""
    sample, other = prompt(tiny), tiny.prompt(5, 8)
    close(tiny.model(**tiny.inputs([other])).logits[0], predict(tiny, other, RULES[0]).logits)
    expected = predict(tiny, sample, RULES[0])
    close(tiny.model(**tiny.inputs([sample])).logits[0], expected.logits)
    same_decisions(handle.trace, [expected])


@pytest.mark.parametrize("where", WHERE)
def test_an_exception_leaves_nothing_behind(tiny: Tiny, where: str) -> None:
    pool = PagedPool(64, torch.float32, "cpu", page_size=16)
    handle = enable(tiny, RULES[0], pool=pool)
    state = snapshot(tiny.model)
    for call in (tiny.model, tiny.model.generate):
        with failing(part(tiny, where), RuntimeError("out of memory")), pytest.raises(RuntimeError, match="of memory"):
            call(**tiny.inputs([prompt(tiny)]))
        assert pool.stats().leases == 0
        assert pool.stats().pages_in_use == 0
        assert snapshot(tiny.model) == state
        check_recovery(tiny, handle)


@pytest.mark.parametrize("then", ["forward", "disable"])
def test_an_interrupt_leaves_nothing_behind(tiny: Tiny, then: str) -> None:
    """Torch runs no hooks after Ctrl-C: the rows are given back by the next call at the latest."""
    pool = PagedPool(64, torch.float32, "cpu", page_size=16)
    handle = enable(tiny, RULES[0], pool=pool)
    with failing(part(tiny, "layer of the first stage"), KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        tiny.model(**tiny.inputs([prompt(tiny)]))
    if then == "forward":
        check_recovery(tiny, handle)
    else:
        handle.disable()
    assert pool.stats().leases == 0
