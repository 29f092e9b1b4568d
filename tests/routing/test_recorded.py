"""Inference without ``no_grad``: autograd records the forward, and nothing else is different."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import models
import pytest
import torch
from models import CACHE, Tiny, text
from oracle import Rules, predict
from support import RULES, cache_of, checkpointing, close, enable, kv_lengths, never_waits
from torch import Tensor, nn
from transformers import DynamicCache

import reroute
from reroute.core.home import is_recorded
from reroute.core.prefill import Prefill
from reroute.errors import RerouteError
from reroute.methods import FastV
from reroute.rankers import RankInputs, ScoreRanker
from reroute.transformers.cache import RoutedLayer
from reroute_kernels import PagedPool


@pytest.fixture
def plain(tiny: Tiny) -> Iterator[Tiny]:
    """A model in eval mode as it comes from a checkpoint: every parameter requires gradients."""
    tiny.model.requires_grad_(True)
    yield tiny
    tiny.model.requires_grad_(False).zero_grad()


def mixture(tiny: Tiny) -> dict[str, Tensor]:
    small = (2, 3) if tiny.is_qwen else tiny.grid
    return tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 1, tiny.grid, 2, small, 3)])


@pytest.fixture
def pool() -> PagedPool:
    return PagedPool(64, torch.float32, "cpu")


# --- when -----------------------------------------------------------------------------------------------------------


def test_what_is_recorded() -> None:
    frozen, trained = torch.ones(2), torch.ones(2, requires_grad=True)
    assert is_recorded(trained, [])
    assert is_recorded(frozen, [frozen, trained])
    assert not is_recorded(frozen, [frozen])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not is_recorded(trained, [trained])


@pytest.mark.parametrize("rules", RULES)
def test_the_same_as_under_no_grad(plain: Tiny, pool: PagedPool, rules: Rules) -> None:
    given = mixture(plain)
    with enable(plain, rules, pool=pool) as handle:
        actual, trace, stats = plain.model(**given), handle.trace, handle.stats()
        assert pool.stats().pages == 0
        with torch.no_grad():
            expected = plain.model(**given)
        assert pool.stats().pages > 0
        assert handle.stats() == replace(stats, prefills=2)
        close(actual.logits, expected.logits)
        assert actual.logits.requires_grad
        assert not expected.logits.requires_grad
        assert kv_lengths(cache_of(actual)) == kv_lengths(cache_of(expected))
        for stage, other in zip(trace, handle.trace, strict=True):
            assert [kept.tolist() for kept in stage.kept] == [kept.tolist() for kept in other.kept]
            assert not any(scores.requires_grad for scores in stage.scores)


def test_frozen_models_use_the_pool(tiny: Tiny, pool: PagedPool) -> None:
    """Though gradients are enabled: nothing is recorded. What another prefill records does not stay there."""
    given = mixture(tiny)
    with enable(tiny, RULES[0], pool=pool):
        logits = tiny.model(**given).logits
        slab = pool.stats().bytes_reserved
        assert slab > 0
        tiny.model.model.language_model.norm.weight.requires_grad_(True)
        try:
            tiny.model(**given).logits.sum().backward()
        finally:
            tiny.model.requires_grad_(False).zero_grad()
        assert torch.equal(tiny.model(**given).logits, logits)
        with pool.lease([1]) as lease:
            assert not lease.pages.requires_grad
        assert (pool.stats().leases, pool.stats().bytes_reserved) == (0, slab)


def test_in_inference_mode_and_out_of_it(tiny: Tiny) -> None:
    """On one plan, whose index tables fit both kinds of prefill: 64 tokens fill a page."""
    sample = tiny.prompt(0, 64 - 4 - tiny.grid[0] * tiny.grid[1], tiny.grid, 4)
    given = tiny.inputs([sample])
    with enable(tiny, RULES[0]) as handle, handle.using(handle.plan(given["input_ids"])):
        with torch.inference_mode():
            expected = tiny.model(**given).logits
        tiny.model.requires_grad_(True)
        try:
            actual = tiny.model(**given).logits
            actual.sum().backward()
        finally:
            tiny.model.requires_grad_(False).zero_grad()
        close(actual, expected)


def test_later_calls_on_the_cache(plain: Tiny) -> None:
    """Decoding and a later turn, recorded or not."""
    first, second = plain.prompt(0, 5, plain.grid, 4), plain.prompt(1, 2, plain.grid, 3)
    with enable(plain, RULES[0]):
        cache = cache_of(plain.model(**plain.inputs([first]), use_cache=True))
        step = plain.model(**plain.follow([first], [text(7)]), **{CACHE: cache}).logits
        with torch.no_grad():
            turn = plain.model(**plain.follow([first + text(7)], [second]), **{CACHE: cache}).logits
    expected = predict(plain, [first, text(7), second], RULES[0]).logits
    close(step[0], expected[len(first) : len(first) + 1])
    close(turn[0], expected[len(first) + 1 :])


def test_no_operation_waits(plain: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = never_waits(monkeypatch, ["decide", "advance", "restore"], Prefill)
    given = mixture(plain)
    for rules in RULES:
        with enable(plain, rules):
            plain.model(**given)
    assert {"decide", "advance", "restore"} == set(ran)


def test_torch_runs_instead_of_triton(plain: Tiny) -> None:
    """Its operations have no gradients; the next prefill has them back."""
    given = mixture(plain)
    with enable(plain, RULES[0]) as handle:
        handle.backend = replace(handle.backend, name="triton", reason="asked for")
        plain.model(**given)
        stats = handle.stats()
        assert (stats.backend, "autograd records" in stats.backend_reason) == ("torch", True)
        with torch.no_grad():
            plain.model(**given)
        assert (handle.stats().backend, handle.stats().backend_reason) == ("triton", "asked for")


def test_under_autocast(plain: Tiny) -> None:
    given = mixture(plain)
    with enable(plain, RULES[0]), torch.autocast("cpu", torch.bfloat16):
        logits = plain.model(**given).logits
        with torch.no_grad():
            expected = plain.model(**given).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.3)
    logits.float().sum().backward()


# --- rankers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learned(ScoreRanker):
    """Scores by a parameter, and notes what it is given."""

    weight: nn.Parameter = field(default_factory=lambda: nn.Parameter(torch.linspace(-1, 1, 64)))
    seen: list[bool] = field(default_factory=list)

    def scores(self, inputs: RankInputs) -> list[Tensor]:
        self.seen.extend(rows.requires_grad for rows in (inputs.query, *inputs.hidden))
        self.seen.append(torch.is_grad_enabled())
        return [hidden @ self.weight for hidden in inputs.hidden]


@pytest.mark.parametrize("action", ["route", "remove"])
def test_rankers_are_not_recorded(plain: Tiny, action: Any) -> None:
    """On rows of the whole prompt and, for a second pruning, on those of the stage."""
    ranker = Learned()
    pdrop = replace(reroute.methods.PDrop(), ranker=ranker)
    with reroute.enable(plain.model, method=pdrop, action=action, keep=0.5) as handle:
        plain.model(**mixture(plain)).logits.sum().backward()
        assert len(handle.stats().layers) > 1
    assert ranker.seen
    assert not any(ranker.seen)
    assert ranker.weight.grad is None


def test_a_ranker_that_asks_for_nothing(plain: Tiny) -> None:
    """Rows go home all the same, and are recorded."""
    given = mixture(plain)
    with reroute.enable(plain.model, method=FastV(ranker=reroute.rankers.RandomScores()), keep=0.6):
        logits = plain.model(**given).logits
        with torch.no_grad():
            close(logits, plain.model(**given).logits)
        logits.sum().backward()
    assert all(p.grad is not None for p in plain.model.model.language_model.layers.parameters())


# --- checkpointed layers store nothing ------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [RULES[0], Rules((2,), (1.0,))], ids=["routed", "dense"])
@pytest.mark.parametrize("lazy", [False, True])
def test_the_cache_under_gradient_checkpointing(tiny: Tiny, rules: Rules, lazy: bool) -> None:
    """Transformers keeps it from the layers: it comes back empty, and serves for whatever comes next."""
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])
    training = checkpointing(tiny)
    cache = DynamicCache() if lazy else DynamicCache(config=tiny.model.config.get_text_config())
    with enable(training, rules) as handle:
        training.model(**given, **{CACHE: cache}, use_cache=True)
        stats = handle.stats()
        assert (stats.prefills, stats.kv_bytes, len(stats.layer_lengths)) == (1, 0, tiny.num_layers)
    assert cache.get_seq_length() == 0
    close(tiny.model(**given, **{CACHE: cache}).logits, tiny.model(**given).logits)


def test_some_layers_under_gradient_checkpointing(tiny: Tiny) -> None:
    """The others' caches are those of a routed prefill."""
    training, given, cache = checkpointing(tiny), mixture(tiny), DynamicCache()
    with torch.no_grad(), enable(tiny, RULES[0]):
        expected = kv_lengths(cache_of(tiny.model(**given, use_cache=True)))
    for index, layer in enumerate(training.model.model.language_model.layers):
        layer.gradient_checkpointing = index in (1, 3, 6)
    with enable(training, RULES[0]) as handle:
        training.model(**given, **{CACHE: cache}, use_cache=True)
        assert list(handle.stats().layer_lengths) == expected
    layers: Any = cache.layers
    stored = [0 if layer.keys is None else layer.keys.shape[-2] for layer in layers]
    assert stored == [0 if index in (1, 3, 6) else length for index, length in enumerate(expected)]
    assert [isinstance(layer, RoutedLayer) for layer in cache.layers] == [i in (2, 4, 5, 7) for i in range(8)]


# --- refused --------------------------------------------------------------------------------------------------------


def test_a_gradient_that_begins_between_decisions(tiny: Tiny, pool: PagedPool) -> None:
    """A trained vector that a hook adds is no parameter of the decoder: its gradient would be lost where rows wait."""
    given = mixture(tiny)
    added = torch.full((64,), 0.1, requires_grad=True)
    hook = tiny.model.model.language_model.layers[4].register_forward_hook(lambda m, args, out: out + added)
    try:
        with enable(tiny, RULES[0], pool=pool):
            with pytest.raises(RerouteError, match=r"before layer 6 require gradients.*enable_input_require_grads"):
                tiny.model(**given)
            assert pool.stats().leases == 0
            with torch.no_grad():
                expected = tiny.model(**given).logits
            tiny.model.enable_input_require_grads()
            try:
                actual = tiny.model(**given).logits
            finally:
                tiny.model.disable_input_require_grads()
            close(actual, expected)
            actual.sum().backward()
        assert added.grad is not None
        assert added.grad.any()
    finally:
        hook.remove()


@pytest.fixture(scope="module")
def widening() -> Tiny:
    """bf16 before layer 1 and fp32 from there on, as where norms were widened for training."""
    tiny = copy.deepcopy(models.tiny("llava-gqa"))
    decoder = tiny.model.model.language_model.to(torch.bfloat16)
    for part in (*decoder.layers[1:], decoder.norm, tiny.model.lm_head):
        part.float()
    decoder.layers[0].register_forward_hook(lambda module, args, out: out.float())
    return tiny


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (Rules((0, 3), (0.5, 0.25)), "before layer 3 are torch.float32"),
        (Rules((1, 3), (0.5, 0.25), score_layer_offset=-1), "before layer 1 are torch.float32"),
        (Rules((0,), (0.5,)), "layers return are torch.float32"),
    ],
)
def test_a_dtype_that_changes_behind_a_decision(widening: Tiny, recorded: bool, rules: Rules, words: str) -> None:
    given = widening.inputs([widening.prompt(0, 5, widening.grid, 4)])
    with enable(widening, rules), torch.set_grad_enabled(recorded):
        widening.model.requires_grad_(recorded)
        with pytest.raises(RerouteError, match=f"{words}.*were torch.bfloat16.*model.to"):
            widening.model(**given)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_dtype_that_changes_before_the_first_decision(widening: Tiny, recorded: bool) -> None:
    given = widening.inputs([widening.prompt(0, 5, widening.grid, 4)])
    widening.model.requires_grad_(recorded)
    dense = widening.model(**given).logits
    with enable(widening, RULES[0]), torch.set_grad_enabled(recorded):
        assert widening.model(**given).logits.dtype == dense.dtype == torch.float32
