"""``handle.using(plan)``: a second prefill inside does nothing that a CUDA graph capture forbids."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import models
import pytest
import torch
from models import CACHE, Tiny
from oracle import Rules
from support import RULES, NoWaiting, cache_of, enable, generate, kv_lengths
from torch import Tensor
from turns import is_fresh

import reroute
from reroute.core.workspace import Workspace
from reroute.errors import RerouteError
from reroute.rankers import Diversity
from reroute_kernels import PagedPool


def refuse(data: Any = (), *_: Any, **__: Any) -> Tensor:
    """In place of what makes tensors from host data; an empty one copies nothing (Transformers' caches begin so)."""
    assert len(data) == 0, "a tensor of host data cannot be captured"
    return torch.empty(0)


@contextmanager
def capturing() -> Iterator[None]:
    """What a capture forbids fails; on the CPU nothing else can tell."""
    with ExitStack() as stack:
        for name in ("tensor", "as_tensor", "from_numpy"):
            stack.enter_context(mock.patch.object(torch, name, refuse))
        lease = mock.patch.object(PagedPool, "lease", side_effect=AssertionError("a lease cannot be captured"))
        stack.enter_context(lease)
        stack.enter_context(NoWaiting("_pin_memory", "is_pinned"))
        yield


def inputs(tiny: Tiny, seed: int) -> dict[str, Tensor]:
    """Two prompts of one length from embedded tokens on: before that Transformers itself waits for the device."""
    samples = [tiny.prompt(seed + b, 5, tiny.grid, 4) for b in range(2)]
    given = {"inputs_embeds": torch.stack([tiny.embeds(sample) for sample in samples])}
    if tiny.is_qwen:
        given["position_ids"] = torch.stack([tiny.positions(sample) for sample in samples], dim=1)
    return given


def ids(tiny: Tiny) -> Tensor:
    return tiny.inputs([tiny.prompt(b, 5, tiny.grid, 4) for b in range(2)])["input_ids"]


@pytest.mark.parametrize("rules", [*RULES, Rules((2, 4), (0.5, 0.3), "remove", score_layer_offset=-1)])
def test_a_second_prefill_can_be_captured(tiny: Tiny, rules: Rules) -> None:
    first, second = inputs(tiny, 0), inputs(tiny, 10)
    with enable(tiny, rules) as handle:
        plan = handle.plan(ids(tiny))
        with handle.using(plan):
            expected = tiny.model(**second)
        with handle.using(plan):
            tiny.model(**first)
            with capturing():
                output = tiny.model(**second)
        assert handle.stats().prefills == 3
    assert torch.equal(output.logits, expected.logits)


def test_the_usual_method_too(tiny: Tiny) -> None:
    """Whose first decision is ranked by more than attention."""
    first, second = inputs(tiny, 0), inputs(tiny, 10)
    with reroute.enable(tiny.model, keep=0.4) as handle, handle.using(handle.plan(ids(tiny))):
        expected = tiny.model(**second)
        tiny.model(**first)
        with capturing():
            output = tiny.model(**second)
        assert handle.schedule.rankers[0] == Diversity()
    assert torch.equal(output.logits, expected.logits)


@pytest.mark.parametrize("rules", RULES)
def test_a_padded_batch_too(rules: Rules) -> None:
    """Transformers looks into a mask unless it knows that it is being captured."""
    tiny = models.tiny("llava-gqa")
    samples = [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 2, tiny.grid, 3, tiny.grid, 2)]
    given = tiny.inputs(samples)
    padded = [torch.nn.functional.pad(e, (0, 0, len(samples[1]) - len(e), 0)) for e in map(tiny.embeds, samples)]
    run = functools.partial(tiny.model, inputs_embeds=torch.stack(padded), attention_mask=given["attention_mask"])
    with enable(tiny, rules) as handle, handle.using(handle.plan(given["input_ids"], given["attention_mask"])):
        expected = run()
        with mock.patch("transformers.masking_utils.is_tracing", return_value=True), capturing():
            output = run()
    assert torch.equal(output.logits, expected.logits)


def test_renumbered_positions_too() -> None:
    tiny = models.tiny("llava-gqa")
    given = inputs(tiny, 0)
    with (
        enable(tiny, Rules((2, 4), (0.5, 0.25), "remove", position_mode="renumbered")) as handle,
        handle.using(handle.plan(ids(tiny))),
    ):
        expected = tiny.model(**given)
        with capturing():
            output = tiny.model(**given)
    assert torch.equal(output.logits, expected.logits)


@pytest.mark.parametrize("kept_layout", [False, True])
def test_a_first_prefill_cannot(tiny: Tiny, kept_layout: bool) -> None:
    """So the stand-in notices."""
    given = inputs(tiny, 0)
    with enable(tiny, RULES[0]) as handle:
        plan = handle.plan(ids(tiny))
        if kept_layout:
            with handle.using(plan):
                tiny.model(**given)
        with (
            handle.using(plan),
            capturing(),
            pytest.raises(AssertionError, match="cannot be captured"),
        ):
            tiny.model(**given)


def test_rows_are_held_until_the_block_ends(tiny: Tiny) -> None:
    pool = PagedPool(64, torch.float32, "cpu")
    with enable(tiny, RULES[0], pool=pool) as handle:
        plan = handle.plan(ids(tiny))
        with handle.using(plan):
            assert pool.stats().leases == 0
            outputs = []
            for _ in range(2):
                outputs.append(tiny.model(**inputs(tiny, 0)))
                assert pool.stats().leases == 1
            with (
                pytest.raises(RuntimeError, match="planted"),
                mock.patch.object(
                    tiny.model.model.language_model.layers[-1], "forward", side_effect=RuntimeError("planted")
                ),
            ):
                tiny.model(**inputs(tiny, 0))
            assert pool.stats().leases == 1
            with handle.using(handle.plan(ids(tiny))):
                tiny.model(**inputs(tiny, 0))
                assert pool.stats().leases == 2
        assert pool.stats().leases == 0
        assert torch.equal(outputs[0].logits, outputs[1].logits)
        lengths = [[layer.keys.shape[-2] for layer in getattr(o, CACHE).layers] for o in outputs]
        assert lengths[0] == lengths[1]


def test_generation_on_a_plan(tiny: Tiny) -> None:
    """The steps that follow the prefill are those of any routed cache."""
    samples = [tiny.prompt(b, 5, tiny.grid, 4) for b in range(2)]
    for rules in (RULES[0], Rules((2,), (1.0,))):
        with enable(tiny, rules) as handle:
            expected = generate(tiny, samples)
            with handle.using(handle.plan(ids(tiny))):
                output = generate(tiny, samples)
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(torch.stack(output.logits), torch.stack(expected.logits))
        assert kv_lengths(cache_of(output)) == kv_lengths(cache_of(expected))


def test_text_has_no_plan(tiny: Tiny) -> None:
    given = tiny.inputs([tiny.prompt(0, 9)])
    embeds = tiny.model.get_input_embeddings()(given["input_ids"])
    plain = tiny.model(**given).logits
    with enable(tiny, RULES[0]) as handle, handle.using(handle.plan(given["input_ids"])), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(tiny.model(**given).logits, plain)
        assert torch.equal(tiny.model(inputs_embeds=embeds).logits, plain)
        assert handle.stats().prefills == 0


def test_a_plan_is_for_one_shape(tiny: Tiny) -> None:
    given, one = inputs(tiny, 0), tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])
    with enable(tiny, RULES[0]) as handle, handle.using(handle.plan(ids(tiny))):
        cache = cache_of(tiny.model(**given, use_cache=True))
        for call, message in (
            (one, r"= \(2, 25\) after 0 in the cache; this call has \(1, 25\) after 0"),
            (tiny.inputs([tiny.prompt(0, 9)] * 2), r"\(2, 9\) after 0"),
            ({"input_ids": torch.ones(2, 1, dtype=torch.long)}, r"\(2, 1\) after 0"),
            ({name: x[..., :7, :] if name == "inputs_embeds" else x[..., :7] for name, x in given.items()}, "7"),
            ({**given, CACHE: cache}, r"\(2, 25\) after 25\. .* outside of handle\.using"),
        ):
            with pytest.raises(RerouteError, match=message):
                tiny.model(**call)
        assert handle.stats().prefills == 1


def test_a_reservation_moves_to_another_pool() -> None:
    """As when the model's dtype changes between two forwards of one plan."""
    tiny = models.tiny("llava-gqa")
    with enable(tiny, RULES[0]) as handle:
        workspace = Workspace(handle.plan(ids(tiny)))
    first, second = PagedPool(64, torch.float32, "cpu"), PagedPool(64, torch.float64, "cpu")
    lease, layout = workspace.take(first)
    assert workspace.take(first) == (lease, layout)
    assert workspace.take(second)[0].pages.dtype == torch.float64
    assert (first.stats().leases, second.stats().leases) == (0, 1)
    for _ in range(2):
        workspace.release()
    assert second.stats().leases == 0


@pytest.mark.parametrize("rules", [RULES[0], Rules((2, 4), (0.5, 0.25), score_layer_offset=-1)])
def test_turns_that_choose_again_too(tiny: Tiny, rules: Rules) -> None:
    """The first one, which keeps states, and a later one, each on a cache of its own."""
    given, later = inputs(tiny, 0), [tiny.prompt(20 + b, 6) for b in range(2)]
    before = [tiny.prompt(b, 5, tiny.grid, 4) for b in range(2)]
    follows = tiny.follow(before, later)
    with enable(tiny, rules, reopens=True) as handle:
        with handle.using(handle.plan(ids(tiny))):
            tiny.model(**given, use_cache=True)
            with capturing():
                cache = cache_of(tiny.model(**given, use_cache=True))
        plan = handle.plan(follows["input_ids"], follows["attention_mask"], cache)
        embeds = tiny.model.get_input_embeddings()(follows["input_ids"])
        run = functools.partial(tiny.model, inputs_embeds=embeds, position_ids=follows["position_ids"])
        caches = [copy.deepcopy(cache) for _ in range(2)]
        with handle.using(plan):
            expected = run(**{CACHE: caches[0]})
            with capturing():
                output = run(**{CACHE: caches[1]})
    assert torch.equal(output.logits, expected.logits)
    for b, (said, new) in enumerate(zip(before, later, strict=True)):
        is_fresh(output.logits[b], tiny, said, new, rules)
