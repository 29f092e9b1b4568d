"""Routing without naming a model, and the one warning when a picture is there and nothing was routed."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import warnings
import weakref
from typing import Any

import models
import pytest
import torch
from models import Tiny
from support import cache_of, generate, kv_lengths, snapshot
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import reroute
from reroute.errors import RerouteError


def test_present_and_future_models(tiny: Tiny) -> None:
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    plain, before = tiny.model(**tiny.inputs([sample])).logits, snapshot(tiny.model)
    methods = PreTrainedModel.__call__, GenerationMixin.generate
    with reroute.enable(tiny.model, method="fastv", keep=0.5):
        expected = tiny.model(**tiny.inputs([sample])).logits
    reroute.enable(method="fastv", keep=0.5, backend="torch")
    try:
        assert torch.equal(tiny.model(**tiny.inputs([sample])).logits, expected)
        later = models.llava(layers=4)
        shorter = kv_lengths(cache_of(generate(later, [later.prompt(0, 5, later.grid, 4)], 2)))
        assert min(shorter) < max(shorter)
    finally:
        reroute.disable()
    assert torch.equal(tiny.model(**tiny.inputs([sample])).logits, plain)
    assert snapshot(tiny.model) == before
    assert (PreTrainedModel.__call__, GenerationMixin.generate) == methods
    assert len(set(kv_lengths(cache_of(generate(later, [later.prompt(0, 5, later.grid, 4)], 2))))) == 1


def test_the_first_generation_is_routed_as_the_later_ones() -> None:
    """Also without a cache, where the end of the prompt must be known."""
    tiny = models.llava(layers=4)
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    reroute.enable(keep=0.5)
    try:
        first = generate(tiny, [sample], use_cache=False).sequences
        assert torch.equal(generate(tiny, [sample], use_cache=False).sequences, first)
        assert torch.equal(generate(tiny, [sample]).sequences, first)
    finally:
        reroute.disable()


def test_enabled_again() -> None:
    """What was set before is replaced, also for models that were called; but not of a model that has its own."""
    common, own = (models.llava(layers=4) for _ in range(2))
    handle, routed = reroute.enable(own.model, keep=0.75), list[Any]()
    for keep in (0.5, 0.25):
        reroute.enable(keep=keep)
        for tiny in (common, own):
            tiny.model(**tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)]))
        routed.append(reroute.handle_of(common.model))
        assert (routed[-1].config.keep, routed[-1].stats().prefills) == (keep, 1)
        assert reroute.handle_of(own.model) is handle
    with pytest.raises(RerouteError, match="must be a number"):
        reroute.enable(keep=2)
    assert [its.is_enabled for its in routed] == [False, True]
    reroute.disable()
    assert not any(its.is_enabled for its in (handle, *routed))


def test_settings_of_one_model_come_first(tiny: Tiny) -> None:
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    own = reroute.enable(tiny.model, schedule=reroute.Schedule((1,), (0.25,)))
    reroute.enable(keep=0.5)
    try:
        lengths = kv_lengths(cache_of(tiny.model(**tiny.inputs([sample]), use_cache=True)))
        assert lengths == [25] + [13] * 7
        assert own.stats().prefills == 1
    finally:
        reroute.disable()


def test_other_models_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    model: Any = LlamaForCausalLM(config)
    model.eval()
    expected = model(torch.tensor([[1, 2]])).logits
    small = models.llava(layers=2)
    reroute.enable(schedule=reroute.Schedule((3,), (0.5,)))
    try:
        assert torch.equal(model(torch.tensor([[1, 2]])).logits, expected)
        with caplog.at_level(logging.WARNING, logger="reroute"):
            for _ in range(2):
                small.model(**small.inputs([small.prompt(0, 5, small.grid, 4)]))
        assert len(caplog.records) == 1
        assert "is not routed: Routing layer 3 does not exist" in caplog.text
        gone = weakref.ref(small.model)
        del small
        gc.collect()
        assert gone() is None  # though the record is still there
    finally:
        reroute.disable()


def test_a_model_that_is_refused_can_be_compiled(caplog: pytest.LogCaptureFixture) -> None:
    """As a whole, once it has been called. A copy of it is looked at for itself, and nothing is left on it."""
    small = models.llava(layers=2)
    given, before = small.inputs([small.prompt(0, 5, small.grid, 4)]), set(vars(small.model))
    reroute.enable(schedule=reroute.Schedule((3,), (0.5,)))
    try:
        with caplog.at_level(logging.WARNING, logger="reroute"), torch.no_grad():
            expected = small.model(**given).logits
            compiled: Any = torch.compile(small.model.model.language_model, backend="eager", fullgraph=True)
            whole: Any = torch.compile(small.model.__call__, backend="eager", fullgraph=True)
            assert whole(input_ids=given["input_ids"]).logits.shape == expected.shape
            assert compiled(given["input_ids"]).last_hidden_state.shape[:2] == given["input_ids"].shape
            assert len(caplog.records) == 1
            copy.deepcopy(small.model)(**given)
            assert len(caplog.records) == 2
    finally:
        reroute.disable()
    assert set(vars(small.model)) == before


def test_the_handle_of_a_model(tiny: Tiny) -> None:
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])
    assert reroute.handle_of(tiny.model) is None
    reroute.enable(keep=0.5, trace=True)
    try:
        assert reroute.handle_of(tiny.model) is None  # not called yet
        tiny.model(**given)
        handle = reroute.handle_of(tiny.model)
        assert handle is not None
        assert handle.stats().prefills == 1
        assert handle.trace is not None
        own = reroute.enable(tiny.model, keep=0.5)
        assert reroute.handle_of(tiny.model) is own
    finally:
        reroute.disable()
    assert reroute.handle_of(tiny.model) is None


def test_the_handle_of_all_models() -> None:
    """A block for all models, which ends what it began and nothing else."""
    common, own = (models.llava(layers=4) for _ in range(2))
    given = common.inputs([common.prompt(0, 5, common.grid, 4)])
    plain = common.model(**given).logits
    handle = reroute.enable(own.model, keep=0.75)
    try:
        with reroute.enable(method="fastv", keep=0.5) as all_models:
            assert not torch.equal(common.model(**given).logits, plain)
            assert repr(all_models) == "<ProcessHandle: fastv, route, keep=0.5, enabled>"
            assert all_models.config.keep == 0.5
            with pytest.raises(RerouteError, match="in a with block that has not ended"):
                reroute.enable(keep=0.25)
            with reroute.enable(own.model, keep=0.5):
                assert all_models.is_enabled
            handle = reroute.enable(own.model, keep=0.75)
        assert torch.equal(common.model(**given).logits, plain)
        assert reroute.handle_of(own.model) is handle
        assert repr(all_models).endswith("disabled>")
        all_models.disable()  # once more
        first, second = (reroute.enable(keep=keep) for keep in (0.5, 0.25))
        first.disable()  # was replaced, and ends nothing
        assert second.is_enabled
        with pytest.raises(RerouteError, match="disabled or replaced"), first:
            pass
        common.model(**given)
        routed = reroute.handle_of(common.model)
        assert routed is not None
        assert routed.config.keep == 0.25
        second.disable()
        assert torch.equal(common.model(**given).logits, plain)
    finally:
        reroute.disable()


def test_a_backend_that_cannot_run_for_one_model(
    tiny: Tiny, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a model on the CPU of a machine with a GPU: it says so, and the forward goes on."""
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])
    plain = tiny.model(**given).logits
    monkeypatch.setattr("reroute.config.check_backend", lambda _: None)  # there is a GPU
    reroute.enable(backend="triton")
    try:
        with caplog.at_level(logging.WARNING, logger="reroute"):
            assert torch.equal(tiny.model(**given).logits, plain)
        assert "is not routed: backend='triton' cannot run: it needs CUDA tensors and these are on cpu" in caplog.text
    finally:
        reroute.disable()


def test_backend_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    from reroute_kernels import dispatch

    dispatch._resolve.cache_clear()
    with caplog.at_level(logging.INFO, logger="reroute"):
        for name in ("llava-mha", "llava-gqa"):
            reroute.enable(models.tiny(name).model)
    assert [r.message for r in caplog.records] == [
        "backend torch on cpu: triton cannot run: it needs CUDA tensors and these are on cpu"
    ]


# --- warnings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["with the picture", "merged", "generate"])
def test_embeddings_hide_the_picture(call: str) -> None:
    """With ``inputs_embeds`` alone nobody can tell which tokens are visual."""
    tiny = models.llava(layers=4)
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    given = tiny.inputs([sample])
    ids, run = given.pop("input_ids"), tiny.model
    if call == "with the picture":
        given["inputs_embeds"] = tiny.model.get_input_embeddings()(ids)
    else:
        given = {"inputs_embeds": tiny.embeds(sample)[None]}
        run = functools.partial(tiny.model.generate, max_new_tokens=3) if call == "generate" else run
    with reroute.enable(tiny.model, keep=0.5) as handle:
        with pytest.warns(UserWarning, match="nothing was routed: the prompt came as inputs_embeds") as caught:
            run(**given)
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(**given)
        assert handle.stats().prefills == 0
        assert "no prefill with visual tokens was recorded yet" in str(handle.stats())


def test_embeddings_of_a_plan_hide_nothing() -> None:
    tiny = models.llava(layers=4)
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    with reroute.enable(tiny.model, keep=0.5) as handle, warnings.catch_warnings():
        warnings.simplefilter("error")
        with handle.using(handle.plan(torch.tensor([sample.ids]))):
            tiny.model.generate(inputs_embeds=tiny.embeds(sample)[None], max_new_tokens=3)
        assert handle.stats().prefills == 1


def test_silence_where_all_is_well(tiny: Tiny) -> None:
    picture, plain = tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 9)
    for keep in (0.5, 1.0):
        with reroute.enable(tiny.model, keep=keep), warnings.catch_warnings():
            warnings.simplefilter("error")
            tiny.model(**tiny.inputs([picture]))
            tiny.model(**tiny.inputs([plain]))
            generate(tiny, [picture, plain], 2)
