"""Whatever ends a call early, at whatever place: nothing of it acts on later calls, and nothing of it stays."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from cut_short import ENDS, Parts, TimeIsUp, ended, in_call, parts_of, raising, refused
from models import CACHE, Sample
from oracle import Rules, predict
from support import (
    FAMILIES,
    FEW,
    PLACES,
    close,
    enable,
    generate,
    inside,
    labels_after,
    snapshot,
)
from torch import Tensor
from transformers import DynamicCache

import reroute
from reroute_kernels import PagedPool


@pytest.fixture(params=FAMILIES)
def parts(request: pytest.FixtureRequest) -> Parts:
    return parts_of(request.param)


@pytest.fixture
def pool() -> PagedPool:
    """Room for one prompt: rows that stay leased are missed at once."""
    return PagedPool(64, torch.float32, "cpu", page_size=16, max_bytes=3 * 16 * 64 * 4)


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


# --- generations --------------------------------------------------------------------------------------------------


class EndAfter:
    """Ends a generation in its step number ``steps``: between two forwards."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return scores


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_generation_that_was_cut_short(parts: Parts, pool: PagedPool, use_cache: bool, step: int) -> None:
    """Between two forwards, and in the midst of one. The prompt's end is forgotten with it."""
    few = parts.few
    longer = few.prompt(4, 5, few.grid, 14)  # the former prompt's end is in the midst of its question
    expected = predict(few, longer, FEW)
    with enable(few, FEW, pool=pool):
        alone = generate(few, [parts.sample], 3, use_cache=use_cache)
        for place in (None, *PLACES.values()):
            if place is None:
                ended(
                    KeyboardInterrupt,
                    lambda: generate(few, [parts.sample], 4, use_cache=use_cache, logits_processor=[EndAfter(step)]),
                )
            else:
                module = place(few.model)
                number = 1 if module is PLACES["the vision tower"](few.model) else step
                with in_call(module, number):
                    ended(KeyboardInterrupt, lambda: generate(few, [parts.sample], 4, use_cache=use_cache))
            assert pool.stats().leases == 0
            # As a program does that generates by itself.
            inputs = few.model.prepare_inputs_for_generation(**few.inputs([longer]), use_cache=False)
            close(few.model(**inputs).logits[0, -1], expected.logits[-1])
        parts.check()
        again = generate(few, [parts.sample], 3, use_cache=use_cache)
    assert torch.equal(torch.stack(again.logits), torch.stack(alone.logits))


@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_cache_of_a_generation_that_was_cut_short(parts: Parts, step: int) -> None:
    """Between two forwards it is whole, and goes on; in the midst of one it is not."""
    few, cache, torn = parts.few, DynamicCache(), DynamicCache()
    layer = few.model.model.language_model.layers[2]
    with enable(few, FEW):
        tokens = generate(few, [parts.sample], 5).sequences[0, len(parts.sample) :].tolist()
        given = few.inputs([parts.sample])
        ended(
            KeyboardInterrupt,
            lambda: generate(few, given, 5, **{CACHE: cache}, logits_processor=[EndAfter(step)]),
        )
        assert cache.get_seq_length() == len(parts.sample) + step - 1
        before, new = parts.sample + Sample(tuple(tokens[: step - 1])), Sample(tuple(tokens[step - 1 : step + 1]))
        logits = few.model(**few.follow([before], [new]), **{CACHE: cache}).logits
        close(logits[0], predict(few, parts.sample, FEW, then=tokens[: step + 1]).logits[-2:])
        with in_call(layer, step):
            ended(KeyboardInterrupt, lambda: generate(few, given, 5, **{CACHE: torn}))
        refused(few, torn, before)


# --- threads ------------------------------------------------------------------------------------------------------


def in_thread(run: Callable[[], Any]) -> None:
    """A thread that may die."""
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


@pytest.fixture
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("place", ["a norm that scores", "a routed layer", "a layer that decides", "the final norm"])
def test_threads_that_die(parts: Parts, pool: PagedPool, place: str) -> None:
    """In a forward, in blocks of settings and of plans, in a generation: the pool has room for one of them."""
    few, died = parts.few, []

    def die() -> None:
        died.append(1)
        raise TimeIsUp

    with enable(few, FEW, pool=pool) as handle:
        plan = handle.plan(parts.given["input_ids"])

        def plain() -> None:
            few.model(**parts.given, labels=parts.labels)

        def settings() -> None:
            with handle.at(keep=0.4):
                few.model(**parts.given)

        def planned() -> None:
            with handle.using(plan):
                few.model(**parts.given)

        def generation() -> None:
            generate(few, [parts.sample], 2)

        for number, run in enumerate((plain, settings, planned, generation)):
            with inside(PLACES[place](few.model), die):
                in_thread(run)
            assert len(died) == number + 1
            assert pool.stats().leases == 0
            parts.check()


def test_blocks_that_nobody_ends(parts: Parts, pool: PagedPool) -> None:
    """A thread that is gone, and took the ends of its blocks with it."""
    few = parts.few

    def run() -> None:
        for block in (handle.using(plan), handle.at(keep=0.4)):
            block.__enter__()
        few.model(**parts.given)

    with enable(few, FEW, pool=pool) as handle:
        plan = handle.plan(parts.given["input_ids"])
        for _ in range(3):
            in_thread(run)
            gc.collect()
            assert pool.stats().leases == 0
        parts.check()


# --- between any two lines of the product -------------------------------------------------------------------------

ROUTING = os.path.join(os.path.dirname(reroute.__file__), "")
PARTS_OF_A_CALL = ("transformers", "workspace", "home", "prefill", "handle", "scopes")


class Interrupts:
    """Ends a call where Python looks for signals: at the beginning of functions, and after built-in ones.

    Only what the files named ``PARTS_OF_A_CALL`` do counts. ``stop``: at which of these points.
    """

    def __init__(self, stop: int | None = None) -> None:
        self.seen: list[tuple[str, int, str]] = []
        self.stop = stop

    def __call__(self, frame: Any, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event not in ("call", "c_return") or not name.startswith(ROUTING) or "<" in frame.f_code.co_name:
            return
        if any(part in name for part in PARTS_OF_A_CALL):
            self.seen.append((name, frame.f_lineno, event))
            if len(self.seen) - 1 == self.stop:
                sys.setprofile(None)
                raise KeyboardInterrupt

    @staticmethod
    def run(call: Callable[[], Any], stop: int | None = None) -> list[tuple[str, int, str]]:
        interrupts = Interrupts(stop)
        sys.setprofile(interrupts)
        try:
            call()
        finally:
            sys.setprofile(None)
        return interrupts.seen


def test_an_interrupt_anywhere() -> None:
    """In a labelled call, and in a generation inside of a block of settings: at each line once."""
    few, pool = models.llava(layers=2, side=2), PagedPool(64, torch.float32, "cpu")
    sample = few.prompt(3, 2, few.grid, 4)
    given, labels = few.inputs([sample]), labels_after(sample, len(sample) - 2)
    handle = enable(few, Rules((1,), (0.5,)), pool=pool)

    def labelled() -> None:
        few.model(**given, labels=labels)

    def generation() -> None:
        with handle.at(keep=0.7):
            few.model.generate(**given, max_new_tokens=2)

    done: set[tuple[str, int, str]] = set()
    for call in (labelled, generation):
        call()
        expected = few.model.model(**given).last_hidden_state
        for number, point in enumerate(Interrupts.run(call)):
            if point in done:
                continue
            done.add(point)
            ended(KeyboardInterrupt, lambda: Interrupts.run(call, number))  # noqa: B023
            with handle.idle():
                pass
            assert torch.equal(few.model.model(**given).last_hidden_state, expected), point
    assert len(done) > 150
    gc.collect()
    assert pool.stats().leases == 0
    handle.disable()
