"""A cache that a forward has left half filled is refused by whatever goes on with it, and only that one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cut_short import Parts, TimeIsUp, ended, parts_of, raising, refused
from models import CACHE, Sample, Tiny
from oracle import predict
from support import (
    FAMILIES,
    FEW,
    cache_of,
    close,
    enable,
    inside,
    kv_lengths,
    state_of,
    unchanged,
)
from torch import nn
from transformers import DynamicCache


@pytest.fixture(params=FAMILIES)
def parts(request: pytest.FixtureRequest) -> Parts:
    return parts_of(request.param)


def moments(few: Tiny, layer: int) -> dict[str, tuple[nn.Module, bool]]:
    """Where layer ``layer`` may be interrupted, and whether after the module has run: its attention stores."""
    module = few.model.model.language_model.layers[layer]
    return {
        "before it stores": (module.self_attn, False),
        "after it has stored": (module.self_attn, True),
        "at its end": (module, True),
    }


@pytest.mark.parametrize("made", [lambda config: DynamicCache(), lambda config: DynamicCache(config=config)])
@pytest.mark.parametrize("layer", range(5))
@pytest.mark.parametrize("moment", ["before it stores", "after it has stored", "at its end"])
def test_a_prompt_that_was_cut_short(parts: Parts, made: Callable[[Any], Any], layer: int, moment: str) -> None:
    """Its cache is refused by all later calls, with routing and without it. Once it is reset, it is a new one."""
    few = parts.few
    cache = made(few.model.config.get_text_config())
    module, after = moments(few, layer)[moment]
    with enable(few, FEW) as handle:
        with inside(module, raising(), after=after):
            ended(KeyboardInterrupt, lambda: few.model(**parts.given, **{CACHE: cache}))
        if layer or after:
            refused(few, cache, parts.sample)
            handle.disable()
            refused(few, cache, parts.sample)
            cache.reset()
    with enable(few, FEW):  # nothing was stored, or nothing is any more
        output = few.model(**parts.given, **{CACHE: cache})
    assert torch.equal(output.logits, parts.expected["the model"])
    assert kv_lengths(cache) == predict(few, parts.sample, FEW).kv_lengths


LATER: dict[str, Callable[[Tiny], Sample]] = {
    "a step": lambda few: few.prompt(9, 1),
    "a turn": lambda few: few.prompt(9, 3),
    "a picture": lambda few: few.prompt(9, 2, few.grid, 4),
}


@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize("layer", [0, 1, 2, 4])
@pytest.mark.parametrize("moment", ["before it stores", "after it has stored", "at its end"])
def test_tokens_that_were_cut_short(parts: Parts, later: str, layer: int, moment: str) -> None:
    """After a whole prompt. If nothing was stored, the conversation goes on as if they had not been given."""
    few, new = parts.few, LATER[later](parts.few)
    module, after = moments(few, layer)[moment]
    with enable(few, FEW) as handle:
        cache = cache_of(few.model(**few.inputs([parts.sample], positions=True), use_cache=True))
        held = state_of(cache)
        with inside(module, raising(), after=after):
            ended(KeyboardInterrupt, lambda: few.model(**few.follow([parts.sample], [new]), **{CACHE: cache}))
        if layer or after:
            refused(few, cache, parts.sample)
            handle.disable()
            refused(few, cache, parts.sample)
            return
        unchanged(cache, held)
        handle.disable()
        # No layer was left writable for those who know nothing of routing.
        refused(few, cache, parts.sample, "filled while routing was on")
    with enable(few, FEW):
        logits = few.model(**few.follow([parts.sample], [new]), **{CACHE: cache}).logits
    close(logits[0], predict(few, [parts.sample, new], FEW).logits[-len(new) :])


def test_a_cache_is_whole_once_the_base_model_has_ended(parts: Parts) -> None:
    """What ends the head, or a callback, has cut nothing short."""
    few, new = parts.few, parts.few.prompt(9, 3)
    expected = predict(few, [parts.sample, new], FEW)

    def callback(_: Any) -> None:
        raise TimeIsUp

    with enable(few, FEW) as handle:
        for kind, place in ((KeyboardInterrupt, few.model.lm_head), (TimeIsUp, None)):
            cache = DynamicCache()
            call = lambda: few.model(**parts.given, **{CACHE: cache})  # noqa: B023
            if place is None:
                end = handle.on_prefill(callback)
                ended(kind, call)
                end()
            else:
                with inside(place, raising(kind)):
                    ended(kind, call)
            logits = few.model(**few.follow([parts.sample], [new]), **{CACHE: cache}).logits
            close(logits[0], expected.logits[-3:])
            assert kv_lengths(cache) == expected.kv_lengths


def test_a_forward_that_others_cut_short_inside_of_it(parts: Parts) -> None:
    """A hook that catches what ends its own call tears its own cache only."""
    few, own, other = parts.few, DynamicCache(), DynamicCache()
    layer = few.model.model.language_model.layers[2]

    def ask() -> None:
        with inside(layer, raising()):
            ended(KeyboardInterrupt, lambda: few.model(**parts.given, **{CACHE: other}))

    with enable(few, FEW):
        with inside(few.model.model.language_model.layers[3], ask):
            assert torch.equal(few.model(**parts.given, **{CACHE: own}).logits, parts.expected["the model"])
        refused(few, other, parts.sample)
        new = few.prompt(9, 3)
        logits = few.model(**few.follow([parts.sample], [new]), **{CACHE: own}).logits
    close(logits[0], predict(few, [parts.sample, new], FEW).logits[-3:])
