"""Each call is routed by what belongs to it: its labels, its prompt, its settings; whatever runs around or inside."""

from __future__ import annotations

import functools
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
    generate,
    inside,
    kv_lengths,
    labels_after,
    small,
)
from torch import Tensor

import reroute
from reroute.errors import RerouteError


class Asked:
    """A model, a call of it, and calls that something inside of that may make, each with what it gives alone."""

    def __init__(self, few: Tiny, other: Tiny) -> None:
        model, decoder = few.model, few.model.model.language_model
        self.few, self.other = few, other
        self.outer = few.inputs([few.prompt(3, 5, few.grid, 5)])
        alike = few.inputs([few.prompt(4, 5, few.grid, 5)])  # of the same shape as the outer call
        longer, text = few.inputs([few.prompt(5, 2, few.grid, 9)]), few.inputs([few.prompt(6, 7)])
        foreign = other.inputs([other.prompt(7, 5, other.grid, 5)])
        states = torch.randn(1, 9, model.lm_head.in_features, generator=torch.Generator().manual_seed(0))
        rope = decoder.rotary_emb(states, few.positions(few.prompt(6, 9)).unsqueeze(-2))
        labels = alike["input_ids"].clone()
        labels[:, :-3] = -100
        self.calls: dict[str, Callable[[], Tensor]] = {
            "the model": lambda: model(**longer).logits,
            "the model, same inputs": lambda: model(**self.outer).logits,
            "the model, text": lambda: model(**text).logits,
            "the model, labels": lambda: model(**alike, labels=labels).logits,
            "forward": lambda: model.forward(**alike).logits,
            "forward, labels": lambda: model.forward(**alike, labels=labels).logits,
            "the base model": lambda: model.model(**alike).last_hidden_state,
            "the base model, text": lambda: model.model(**text).last_hidden_state,
            "the decoder": lambda: decoder(input_ids=self.outer["input_ids"]).last_hidden_state,
            "the decoder, embedded": lambda: decoder(inputs_embeds=states).last_hidden_state,
            "a layer": lambda: decoder.layers[3](states, position_embeddings=rope),
            "generate": lambda: generate(few, longer, 2).sequences,
            "generate without a cache": lambda: generate(few, longer, 2, use_cache=False).sequences,
            "another model": lambda: other.model(**foreign).logits,
            "other settings": lambda: self.at(lambda: model(**alike).logits),
            "a plan": lambda: self.planned(longer),
            "nothing routed": lambda: self.unrouted(alike),
        }
        self.handle = self.enable()
        self.alone = {name: self.counted(call) for name, call in self.calls.items()}

    def enable(self) -> Any:
        """Both models."""
        reroute.enable(self.other.model, schedule=reroute.Schedule((1, 2), (0.4, 0.2)))
        self.handle = enable(self.few, FEW)
        return self.handle

    def at(self, call: Callable[[], Tensor]) -> Tensor:
        with self.handle.at(schedule=reroute.Schedule((2,), (0.2,))):
            return call()

    def planned(self, given: dict[str, Tensor]) -> Tensor:
        with self.handle.using(self.handle.plan(given["input_ids"], given["attention_mask"])):
            logits: Tensor = self.few.model(**given).logits
        return logits

    def unrouted(self, given: dict[str, Tensor]) -> Tensor:
        with self.handle.using(None):
            logits: Tensor = self.few.model(**given).logits
        return logits

    def counted(self, call: Callable[[], Tensor]) -> tuple[Tensor, int]:
        """What ``call`` gives, and how many prefills it records. What Transformers keeps on the model stays."""
        bases = [tiny.model.model for tiny in (self.few, self.other)]
        deltas = [getattr(base, "rope_deltas", None) for base in bases]
        before = self.handle.totals().prefills
        try:
            return call(), self.handle.totals().prefills - before
        finally:
            for base, kept in zip(bases, deltas, strict=True):
                if hasattr(base, "rope_deltas"):
                    base.rope_deltas = kept

    def ask(self, first: int = 0) -> int:
        """Make all calls, beginning with the one numbered ``first``: each gives what it does alone."""
        total, names = 0, list(self.calls)
        for name in names[first:] + names[:first]:
            actual, count = self.counted(self.calls[name])
            expected, alone = self.alone[name]
            assert torch.equal(actual, expected), f"{name} gives something else than alone"
            assert count == alone, f"{name} is recorded otherwise than alone"
            total += count
        return total


@functools.cache
def asking(family: str) -> Asked:
    return Asked(*(small(name) for name in sorted(FAMILIES, key=lambda name: name != family)))


@pytest.fixture(params=FAMILIES)
def asked(request: pytest.FixtureRequest) -> Asked:
    asked = asking(request.param)
    asked.enable()
    return asked


@pytest.mark.parametrize(("place", "labels"), [*((place, True) for place in PLACES), ("the model", False)])
def test_calls_inside_a_forward(asked: Asked, place: str, labels: bool) -> None:
    """Neither they nor the call around them are other than alone. Each place begins with another one of them."""
    model, first, total = asked.few.model, list(PLACES).index(place), []
    given = dict(asked.outer)
    if labels:
        given["labels"] = given["input_ids"].clone()
        given["labels"][:, :-2] = -100
    expected = model(**given)
    trace, before = asked.handle.trace, asked.handle.totals().prefills
    with inside(PLACES[place](model), lambda: total.append(asked.ask(first)), after=first % 2 == 1):
        actual = model(**given)
    assert torch.equal(actual.logits, expected.logits)
    assert kv_lengths(cache_of(actual)) == kv_lengths(cache_of(expected))
    assert asked.handle.totals().prefills - before == total[0] + 1
    if place != "the head":  # else the last prefill is one of theirs
        assert [s.kept[0].tolist() for s in asked.handle.trace] == [s.kept[0].tolist() for s in trace]


EARLY = ("the model", "the base model", "the vision tower", "the embeddings")
"""Places before the decoder is called."""


@pytest.mark.parametrize("place", PLACES)
def test_the_decoder_inside_a_forward_with_embeddings_of_its_shape(asked: Asked, place: str) -> None:
    """It cannot be told from the call that the forward makes where that comes later: then the forward is refused."""
    model, states = asked.few.model, torch.randn(*asked.outer["input_ids"].shape, asked.few.model.lm_head.in_features)
    expected = model(**asked.outer).logits
    plain = model.model.language_model(inputs_embeds=states).last_hidden_state
    got: list[Tensor] = []
    ask = lambda: got.append(model.model.language_model(inputs_embeds=states).last_hidden_state)
    with inside(PLACES[place](model), ask):
        if place in EARLY[1:]:
            with pytest.raises(RerouteError, match="decoder was called twice in one forward"):
                model(**asked.outer)
        else:
            assert torch.equal(model(**asked.outer).logits, expected)
            assert torch.equal(got[0], plain)
    assert torch.equal(model(**asked.outer).logits, expected)


# --- what a plan and settings mean inside -------------------------------------------------------------------------


def test_a_plan_in_use_twice_at_a_time(few: Tiny) -> None:
    """Forwards in one another share a plan, but not the place in the pool: each would overwrite the other's rows."""
    outer, inner = few.prompt(3, 5, few.grid, 5), few.prompt(4, 5, few.grid, 5)
    given, other = few.inputs([outer]), few.inputs([inner])
    expected = [predict(few, sample, FEW).logits for sample in (outer, inner)]
    with enable(few, FEW) as handle, handle.using(handle.plan(given["input_ids"])):
        for place in PLACES:
            got: list[Tensor] = []
            with inside(PLACES[place](few.model), lambda: got.append(few.model(**other).logits)):  # noqa: B023
                close(few.model(**given).logits[0], expected[0])
            close(got[0][0], expected[1])


def test_a_plan_around_calls_of_another_shape(asked: Asked) -> None:
    """They are refused inside of its block, unless they say that they are not of it."""
    model, other = asked.few.model, asked.few.inputs([asked.few.prompt(4, 2, asked.few.grid, 3)])
    expected, plan = model(**asked.outer).logits, asked.handle.plan(asked.outer["input_ids"])

    def ask() -> None:
        with pytest.raises(RerouteError, match="The plan in use is for tokens"):
            model(**other)
        with asked.handle.using(None):
            model(**other)

    with asked.handle.using(plan), inside(PLACES["a routed layer"](model), ask):
        assert torch.equal(model(**asked.outer).logits, expected)


def test_settings_around_and_inside(asked: Asked) -> None:
    """The innermost settings count, for the calls that begin there; a forward keeps those that it began with."""
    model, handle = asked.few.model, asked.handle
    budgets = {}
    for keep in (0.4, 0.6, 0.8):
        with handle.at(keep=keep):
            budgets[keep] = model(**asked.outer).logits
    got: list[Tensor] = []

    def ask() -> None:
        got.append(model(**asked.outer).logits)
        with handle.at(keep=0.6):
            got.append(model(**asked.outer).logits)
            with handle.at(keep=0.8):
                got.append(model(**asked.outer).logits)
            got.append(model(**asked.outer).logits)

    with handle.at(keep=0.4), inside(PLACES["a dense layer"](model), ask):
        assert torch.equal(model(**asked.outer).logits, budgets[0.4])
    for logits, keep in zip(got, (0.4, 0.6, 0.8, 0.6), strict=True):
        assert torch.equal(logits, budgets[keep])


@pytest.mark.parametrize("place", ["a dense layer", "a routed layer"])
def test_blocks_that_end_inside_a_forward(asked: Asked, place: str) -> None:
    """Settings and plans are those of its beginning, and the plan's place in the pool stays until the forward ends."""
    model, handle = asked.few.model, asked.handle
    with handle.at(keep=0.4):
        expected = model(**asked.outer).logits
        plan = handle.plan(asked.outer["input_ids"])
    for block in (handle.at(keep=0.4), handle.using(plan)):
        block.__enter__()
        with inside(PLACES[place](model), lambda: block.__exit__(None, None, None)):  # noqa: B023
            assert torch.equal(model(**asked.outer).logits, expected)


# --- prompts inside of a generation -------------------------------------------------------------------------------


class Ask:
    """A logits processor that asks the model something in each step, and does not change the scores."""

    def __init__(self, call: Callable[[], Tensor]) -> None:
        self.call = call
        self.answers: list[Any] = []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.answers.append(self.call())
        return scores


def prompts_inside(few: Tiny, outer: Sample) -> dict[str, Sample]:
    return {
        "shorter": few.prompt(5, 2, few.grid, 3),
        "longer": few.prompt(6, 5, few.grid, 14),
        "of the same length": few.prompt(4, 5, few.grid, 5),
        "the same": outer,
        "the outer one and more": outer + few.prompt(7, 6),
        "the outer one and another picture": outer + few.prompt(7, 2, few.grid, 6),
        "text": few.prompt(8, 9),
        "longer text": few.prompt(8, 40),
    }


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_prompts_inside_a_generation(asked: Asked, use_cache: bool) -> None:
    """Each step of the outer one knows its own prompt's end; the prompts inside end with their last token."""
    few, handle = asked.few, asked.handle
    outer = few.prompt(3, 5, few.grid, 5)
    expected = generate(few, [outer], 2, use_cache=use_cache)
    for index, (name, sample) in enumerate(prompts_inside(few, outer).items()):
        call = functools.partial(few.model, **few.inputs([sample]), use_cache=bool(index % 2))
        alone = asked.counted(lambda: call().logits)[0]  # noqa: B023
        asking = Ask(lambda: asked.counted(lambda: call().logits)[0])  # noqa: B023
        before = handle.totals().prefills
        actual = generate(few, [outer], 2, use_cache=use_cache, logits_processor=[asking])
        assert torch.equal(torch.stack(actual.logits), torch.stack(expected.logits)), name
        assert len(asking.answers) == 2
        assert all(torch.equal(answer, alone) for answer in asking.answers), name
        assert handle.totals().prefills - before == (1 if use_cache else 2) + 2 * bool(sample.visual)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_generations_inside_a_generation(asked: Asked, use_cache: bool) -> None:
    """With and without a cache of their own, of this model and of another one that is routed."""
    few, other = asked.few, asked.other
    outer, inner, foreign = (
        few.prompt(3, 5, few.grid, 5),
        few.prompt(5, 2, few.grid, 9),
        other.prompt(5, 2, other.grid, 9),
    )
    labels = labels_after(inner, len(inner) - 3)
    calls = {
        "a generation": lambda: generate(few, [inner], 2).sequences,
        "without a cache": lambda: generate(few, [inner], 2, use_cache=False).sequences,
        "of text": lambda: generate(few, [few.prompt(8, 40)], 2, use_cache=False).sequences,
        "of the outer prompt": lambda: generate(few, [outer], 2, use_cache=False).sequences,
        "of another model": lambda: generate(other, [foreign], 2, use_cache=False).sequences,
        "labels": lambda: few.model(**few.inputs([inner]), labels=labels).logits,
        "the base model": lambda: few.model.model(**few.inputs([inner])).last_hidden_state,
    }
    expected = generate(few, [outer], 2, use_cache=use_cache)
    for name, call in calls.items():
        alone = asked.counted(call)[0]
        asking = Ask(lambda: asked.counted(call)[0])  # noqa: B023
        actual = generate(few, [outer], 2, use_cache=use_cache, logits_processor=[asking])
        assert torch.equal(torch.stack(actual.logits), torch.stack(expected.logits)), name
        assert all(torch.equal(answer, alone) for answer in asking.answers), name


def test_a_hook_that_asks_in_every_step(asked: Asked) -> None:
    """In the midst of the forwards of a generation, not between them."""
    few, given = asked.few, asked.few.inputs([asked.few.prompt(6, 5, asked.few.grid, 14)])
    outer = few.prompt(3, 5, few.grid, 5)
    expected, alone = (generate(few, [outer], 3, use_cache=False), asked.counted(lambda: few.model(**given).logits)[0])
    answers: list[Tensor] = []

    def hook(*_: Any) -> None:
        if not busy:
            busy.append(True)
            answers.append(asked.counted(lambda: few.model(**given).logits)[0])
            busy.clear()

    busy: list[bool] = []
    for place in ("the vision tower", "a routed layer", "the final norm"):
        hooked = PLACES[place](few.model).register_forward_hook(hook)
        try:
            actual = generate(few, [outer], 3, use_cache=False)
        finally:
            hooked.remove()
        assert torch.equal(actual.sequences, expected.sequences)
        assert torch.equal(torch.stack(actual.logits), torch.stack(expected.logits))
    assert len(answers) >= 7  # the vision tower runs in the first step
    assert all(torch.equal(answer, alone) for answer in answers)


def test_a_cache_that_goes_on_inside_a_generation(asked: Asked) -> None:
    """A second conversation in turns between the steps of the first."""
    few = asked.few
    outer, first, then = few.prompt(3, 5, few.grid, 5), few.prompt(5, 2, few.grid, 9), few.prompt(6, 1)
    expected = generate(few, [outer], 3)
    caches: list[Any] = []

    def ask() -> Tensor:
        if not caches:
            caches.append(cache_of(few.model(**few.inputs([first], positions=True), use_cache=True)))
            return torch.zeros(())
        given = few.follow([first], [Sample(then.ids * len(caches))])
        turns.append(few.model(**given, **{CACHE: caches[0]}).logits)
        caches[0].crop(-len(caches))
        return torch.zeros(())

    turns: list[Tensor] = []
    asking = Ask(lambda: asked.counted(ask)[0])
    actual = generate(few, [outer], 3, logits_processor=[asking])
    assert torch.equal(torch.stack(actual.logits), torch.stack(expected.logits))
    assert len(turns) == 2
    for turn in turns:
        close(turn[0], predict(few, [first, then], FEW).logits[-1:])
