"""Later turns that cannot choose again, and those that are cut short."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import CACHE, Sample, Tiny
from oracle import Rules, predict
from support import (
    FEW,
    close,
    enable,
    inside,
    schedule,
    state_of,
    unchanged,
)
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from turns import first, is_fresh, turn

import reroute
from reroute.errors import RerouteError, UnsupportedCacheError


def without_it(few: Tiny, handle: Any, said: Sample) -> Any:
    """A cache whose first call ran without it."""
    with handle.at(reopens=False):
        return first(few, [said])


def of_another_schedule(few: Tiny, handle: Any, said: Sample) -> Any:
    with handle.at(schedule=schedule(Rules((2,), (0.5,)))):
        return first(few, [said])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (without_it, "it lacks states of calls that ran without reopens=True"),
        (of_another_schedule, "keeps the states before layer 2, and the schedule begins before layer 1"),
    ],
)
def test_a_cache_that_lacks_the_states(few: Tiny, made: Callable[..., Any], message: str) -> None:
    said, new = few.prompt(0, 5, few.grid, 4), few.prompt(1, 6)
    with enable(few, FEW, reopens=True) as handle:
        cache = made(few, handle, said)
        before = state_of(cache)
        with pytest.raises(RerouteError, match=message):
            turn(few, cache, [said], [new])
        unchanged(cache, before)


def test_a_call_that_kept_every_token_between(few: Tiny) -> None:
    """Nothing is known of its picture until it is taken back, and with it some of what came before."""
    said, other, new = few.prompt(0, 5, few.grid, 4), few.prompt(1, 2, few.grid, 3), few.prompt(2, 6)
    left = Sample(said.ids[:-3], said.visual, said.pixels, said.grids)
    with enable(few, FEW, reopens=True) as handle:
        cache = first(few, [said])
        with handle.at(keep=1.0):
            turn(few, cache, [said], [other])
        with pytest.raises(RerouteError, match="it lacks states of calls that ran without reopens=True"):
            turn(few, cache, [said + other], [new])
        cache.crop(-len(other) - 3)
        is_fresh(turn(few, cache, [left], [new])[0], few, left, new, FEW)


def test_a_turn_of_packed_rows(few: Tiny) -> None:
    """Its own positions are looked at, wherever earlier padding was."""
    said = [few.prompt(0, 5, few.grid, 4), few.prompt(2, 2)]
    with enable(few, FEW, reopens=True):
        cache, inputs = first(few, said), few.follow(said, [few.prompt(b, 3) for b in range(2)])
        inputs["position_ids"][..., 1, 1:] = 0
        with pytest.raises(RerouteError, match="Several prompts are packed in one row"):
            few.model(**inputs, **{CACHE: cache})


def test_a_batch_that_began_with_padded_text(few: Tiny) -> None:
    words = [few.prompt(10, 2), few.prompt(11, 4)]
    said = [few.prompt(b, 2, few.grid, 4) for b in range(2)]
    new = [few.prompt(5 + b, 3) for b in range(2)]
    with enable(few, FEW, reopens=True):
        cache = first(few, words)
        turn(few, cache, words, said)
        inputs = few.follow([a + b for a, b in zip(words, said, strict=True)], new)
        before = state_of(cache)
        with pytest.raises(RerouteError, match="began with padded text"):
            few.model(**inputs, **{CACHE: cache})
        unchanged(cache, before)


def test_embeddings_do_not_show_pictures(few: Tiny) -> None:
    said, new = few.prompt(0, 5, few.grid, 4), few.prompt(1, 6)
    with enable(few, FEW, reopens=True):
        cache, inputs = first(few, [said]), few.follow([said], [new])
        inputs["inputs_embeds"] = few.model.get_input_embeddings()(inputs.pop("input_ids"))
        inputs.pop("mm_token_type_ids", None)
        before = state_of(cache)
        with pytest.raises(RerouteError, match="must show where its visual tokens are"):
            few.model(**inputs, **{CACHE: cache})
        unchanged(cache, before)


def test_rankers_that_look_at_the_tower(few: Tiny) -> None:
    """At once, or for a call; a call that does not choose again may have them."""
    said, new = few.prompt(0, 5, few.grid, 4), few.prompt(1, 6)
    with pytest.raises(RerouteError, match="With reopens=True later turns choose again"):
        reroute.enable(few.model, method="nuwa", reopens=True)
    with enable(few, FEW, reopens=True) as handle:
        nuwa = reroute.RoutingConfig(method="nuwa", keep=0.6, reopens=True)
        with pytest.raises(RerouteError, match="With reopens=True later turns choose again"), handle.at(config=nuwa):
            pass
        with handle.at(config=replace(nuwa, reopens=False)):
            cache = first(few, [said])
        with pytest.raises(RerouteError, match="it lacks states of calls that ran without reopens=True"):
            turn(few, cache, [said], [new])


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("after", [False, True])
def test_a_turn_that_was_cut_short(few: Tiny, layer: int, after: bool) -> None:
    """The cache is refused if anything of it has changed, and goes on if nothing has."""
    said, new = few.prompt(0, 5, few.grid, 4), few.prompt(1, 6)

    def stop() -> None:
        raise KeyboardInterrupt

    with enable(few, FEW, reopens=True):
        cache = first(few, [said])
        module = few.model.model.language_model.layers[layer].self_attn
        with inside(module, stop, after=after), pytest.raises(KeyboardInterrupt):
            turn(few, cache, [said], [new])
        if layer or after:
            with pytest.raises(UnsupportedCacheError, match="half filled"):
                turn(few, cache, [said], [new])
        else:
            is_fresh(turn(few, cache, [said], [new])[0], few, said, new, FEW)


def test_a_mask_of_its_own_tokens_alone(few: Tiny) -> None:
    """It would not say which of the earlier tokens are padding."""
    said, new = few.prompt(0, 5, few.grid, 4), few.prompt(1, 6)
    with enable(few, FEW, reopens=True):
        cache, inputs = first(few, [said]), few.follow([said], [new])
        inputs["attention_mask"] = torch.ones(1, 6, dtype=torch.long)
        before = state_of(cache)
        with pytest.raises(RerouteError, match=r"needs an attention_mask of the whole .* has 6 columns"):
            few.model(**inputs, **{CACHE: cache})
        unchanged(cache, before)


def test_unknown_arguments_for_each_token(few: Tiny) -> None:
    """Of its own tokens, those of padding left out, which are none of the conversation's counts."""
    said = [few.prompt(0, 5, few.grid, 4), few.prompt(2, 2)]
    with enable(few, FEW, reopens=True):
        cache, inputs = first(few, said), few.follow(said, [few.prompt(b, 4) for b in range(2)])
        inputs["attention_mask"][1, -1] = 0
        before = state_of(cache)
        with pytest.raises(RerouteError, match="my_bias has an entry for each token"):
            few.model(**inputs, **{CACHE: cache}, my_bias=torch.zeros(7))
        unchanged(cache, before)


@pytest.mark.filterwarnings("ignore:Routing is enabled")
@pytest.mark.parametrize("how", ["settings", "a plan of such settings", "no plan", "embeddings"])
def test_a_picture_that_did_not_compete(few: Tiny, how: str) -> None:
    """It was routed among its own turn in layers that lack earlier rows, or not at all."""
    said, other, new = few.prompt(0, 5, few.grid, 4), few.prompt(1, 2, few.grid, 3), few.prompt(2, 6)
    with enable(few, FEW, reopens=True) as handle:
        cache, inputs = first(few, [said]), few.follow([said], [other])
        with handle.at(reopens=False):
            plan = handle.plan(inputs["input_ids"], inputs["attention_mask"], cache)
        with ExitStack() as stack:
            if how in ("settings", "embeddings"):
                stack.enter_context(handle.at(reopens=False))
            else:
                stack.enter_context(handle.using(None if how == "no plan" else plan))
            if how == "embeddings":
                kept = {name: inputs[name] for name in ("attention_mask", "position_ids")}
                inputs = {"inputs_embeds": few.embeds(other)[None], **kept}
            logits = few.model(**inputs, **{CACHE: cache}).logits
        if how.endswith("settings"):
            close(logits[0], predict(few, [said, other], FEW).logits[-len(other) :])
        with pytest.raises(RerouteError, match="it lacks states of calls that ran without reopens=True"):
            turn(few, cache, [said + other], [new])


def test_a_cache_of_the_callers_with_a_window_behind_the_first_look(few: Tiny) -> None:
    said, new = few.prompt(0, 5, few.grid, 4), few.prompt(1, 6)
    cache = DynamicCache()
    cache.layer_class_to_replicate = None
    cache.layers = [DynamicLayer() for _ in range(few.num_layers)]  # type: ignore[no-untyped-call]
    cache.layers[1] = DynamicSlidingWindowLayer(sliding_window=64)
    with enable(few, Rules((2,), (0.5,), score_layer_offset=-1), reopens=True):
        few.model(**few.inputs([said], positions=True), **{CACHE: cache})
        before = state_of(cache)
        with pytest.raises(UnsupportedCacheError, match="DynamicSlidingWindowLayer cannot"):
            turn(few, cache, [said], [new])
        unchanged(cache, before)
