"""Whatever ends a call early, at whatever place: nothing of it acts on later calls, and nothing of it stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import CACHE, Sample, Tiny
from oracle import predict
from support import (
    FAMILIES,
    FEW,
    PLACES,
    cache_of,
    close,
    enable,
    inside,
    kv_lengths,
    labels_after,
    small,
    snapshot,
)
from torch import Tensor, nn
from transformers import DynamicCache

from reroute.errors import UnsupportedCacheError
from reroute_kernels import PagedPool


class TimeIsUp(BaseException):
    """What a time limit raises in a thread."""


ENDS: tuple[type[BaseException], ...] = (KeyboardInterrupt, SystemExit, TimeIsUp, GeneratorExit, RuntimeError)
"""What may end a call."""


def raising(kind: type[BaseException] = KeyboardInterrupt) -> Callable[[], None]:
    def act() -> None:
        raise kind

    return act


def ended(kind: type[BaseException], call: Callable[[], Any]) -> None:
    """``call`` is ended by ``kind``."""
    with pytest.raises(kind):
        call()


class Parts:
    """A routed model, and what it and its parts give when nothing has gone wrong."""

    def __init__(self, few: Tiny) -> None:
        self.few, model, decoder = few, few.model, few.model.model.language_model
        self.sample = few.prompt(3, 5, few.grid, 8)
        self.given = few.inputs([self.sample])
        self.labels = labels_after(self.sample, len(self.sample) - 3)
        # As long as the prompt: what is left of a call would fit.
        text = {"input_ids": few.inputs([few.prompt(6, len(self.sample))])["input_ids"]}
        states = torch.randn(1, len(self.sample), model.lm_head.in_features, generator=torch.Generator().manual_seed(0))
        rope = decoder.rotary_emb(states, few.positions(few.prompt(6, len(self.sample))).unsqueeze(-2))
        self.calls: dict[str, Callable[[], Tensor]] = {
            "the decoder": lambda: decoder(**text).last_hidden_state,
            "the decoder, embedded": lambda: decoder(inputs_embeds=states).last_hidden_state,
            "a layer": lambda: decoder.layers[3](states, position_embeddings=rope),
            "the base model": lambda: model.model(**self.given).last_hidden_state,
            "the base model, text": lambda: model.model(**text).last_hidden_state,
            "the model": lambda: model(**self.given).logits,
            "the model, labels": lambda: model(**self.given, labels=self.labels).logits,
        }
        plain = {name: call() for name, call in self.calls.items()}
        with enable(few, FEW):
            self.expected = {name: call() for name, call in self.calls.items()}
        changed = {name for name, value in plain.items() if not torch.equal(value, self.expected[name])}
        assert changed == {"the base model", "the model", "the model, labels"}

    def check(self, first: int = 0) -> None:
        """All are as ever, the one numbered ``first`` before the others."""
        names = list(self.calls)
        for name in names[first % len(names) :] + names[: first % len(names)]:
            assert torch.equal(self.calls[name](), self.expected[name]), name


PARTS = {family: Parts(small(family)) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def parts(request: pytest.FixtureRequest) -> Parts:
    return PARTS[request.param]


@pytest.fixture
def pool() -> PagedPool:
    """Room for one prompt: rows that stay leased are missed at once."""
    return PagedPool(64, torch.float32, "cpu", page_size=16, max_bytes=2 * 16 * 64 * 4)


# --- parts that are called afterwards -----------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_what_is_called_after_a_call_that_was_ended(parts: Parts, pool: PagedPool, place: str) -> None:
    """A labelled one, ended before and after ``place`` has run."""
    model, first = parts.few.model, list(PLACES).index(place)
    before = snapshot(model)
    with enable(parts.few, FEW, pool=pool) as handle:
        for after in (False, True):
            kind = ENDS[(first + after) % len(ENDS)]
            with inside(PLACES[place](model), raising(kind), after=after):
                ended(kind, lambda: model(**parts.given, labels=parts.labels))
            assert pool.stats().leases == 0
            parts.check(first + after)
        # Of the calls that were ended, those are recorded whose prefill was over.
        assert handle.totals().prefills == 2 * 3 + {"the head": 2, "the model": 1}.get(place, 0)
    assert snapshot(model) == before


@pytest.mark.parametrize("place", ["the vision tower", "a layer that decides", "the final norm"])
def test_what_is_called_inside_of_what_has_caught_it(parts: Parts, place: str) -> None:
    """A hook makes a call, which is ended; it goes on, and so does the call around it."""
    model = parts.few.model
    for where in PLACES.values():

        def ask() -> None:
            with inside(where(model), raising()), pytest.raises(KeyboardInterrupt):  # noqa: B023
                model(**parts.given, labels=parts.labels)

        with enable(parts.few, FEW), inside(PLACES[place](model), ask):
            assert torch.equal(model(**parts.given).logits, parts.expected["the model"])


# --- caches that were left half filled ----------------------------------------------------------------------------


def moments(few: Tiny, layer: int) -> dict[str, tuple[nn.Module, bool]]:
    """Where layer ``layer`` may be interrupted, and whether after the module has run: its attention stores."""
    module = few.model.model.language_model.layers[layer]
    return {
        "before it stores": (module.self_attn, False),
        "after it has stored": (module.self_attn, True),
        "at its end": (module, True),
    }


def state_of(cache: Any) -> list[Any]:
    """All that its layers hold."""
    return [
        {name: value.clone() if isinstance(value, Tensor) else value for name, value in public(layer).items()}
        for layer in cache.layers
    ]


def public(layer: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(layer).items() if not name.startswith("_")}


def unchanged(cache: Any, before: list[Any]) -> None:
    """Nothing was stored, and nothing taken away."""
    assert len(cache.layers) == len(before)
    for layer, held in zip(cache.layers, before, strict=True):
        assert public(layer).keys() == held.keys()
        for name, value in public(layer).items():
            assert torch.equal(value, held[name]) if isinstance(value, Tensor) else value == held[name]


def refused(few: Tiny, cache: Any, before: Sample, message: str = "half filled") -> None:
    """Whatever goes on with ``cache``, which has ``before``: a step, a turn, another picture, a generation."""
    held = state_of(cache)
    for new in (few.prompt(9, 1), few.prompt(9, 3), few.prompt(9, 2, few.grid, 4)):
        for call in (few.model, few.model.model):
            with pytest.raises(UnsupportedCacheError, match=message):
                call(**few.follow([before], [new]), **{CACHE: cache})
            unchanged(cache, held)
    whole = few.inputs([Sample(before.ids + few.prompt(9, 3).ids)])  # its picture is in the cache
    with pytest.raises(UnsupportedCacheError, match=message):
        few.model.generate(**whole, **{CACHE: cache}, max_new_tokens=2)
    unchanged(cache, held)
    if message == "half filled":
        with pytest.raises(UnsupportedCacheError, match=message):
            cache.crop(-2)
        unchanged(cache, held)


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
