"""Changes of routing while calls run, in whatever thread: refused with nothing changed, or the calls wait."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from models import Tiny
from support import FEW, PLACES, enable, generate, inside, labels_after, schedule, small, snapshot
from threads import all_equal, together
from torch import Tensor

import reroute
from reroute.errors import RerouteError
from reroute.transformers import parallel, process_wide, router
from reroute.transformers.interception import intercept

STATIONS = ("the vision tower", "a dense layer", "a norm that scores", "a routed layer", "the final norm")
"""Where a call is."""

CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "enable": lambda model, handle: reroute.enable(model, keep=0.7),
    "enable, kept whole": lambda model, handle: reroute.enable(model, keep=1.0),
    "with enable": lambda model, handle: reroute.enable(model, keep=0.7).__enter__(),
    "handle.disable": lambda model, handle: handle.disable(),
    "disable": lambda model, handle: reroute.disable(model),
    "disable all": lambda model, handle: reroute.disable(),
}


def is_refused(change: Callable[[Any, Any], Any], model: Any, handle: Any) -> None:
    """And nothing is changed: not the handle, not what it is set to, not the model."""
    before, config = snapshot(model), handle.config
    with pytest.raises(RerouteError, match="forward or a generation of this model runs"):
        change(model, handle)
    assert snapshot(model) == before
    assert handle.is_enabled
    assert handle.config == config
    assert reroute.handle_of(model) is handle


@pytest.mark.parametrize("change", CHANGES)
def test_changes_from_inside_of_a_call(few: Tiny, change: str) -> None:
    """Of the model, of its base model, of generate; wherever it is."""
    given = few.inputs([few.prompt(3, 5, few.grid, 5)])
    calls: dict[str, Callable[[], Tensor]] = {
        "model": lambda: few.model(**given).logits,
        "forward": lambda: few.model.forward(**given).logits,
        "base": lambda: few.model.model(**given).last_hidden_state,
        "generate": lambda: generate(few, given, 2).sequences,
    }
    with enable(few, FEW) as handle:
        for call in calls.values():
            expected = call()
            for place in STATIONS:
                module = PLACES[place](few.model)
                with inside(module, lambda: is_refused(CHANGES[change], few.model, handle)):
                    assert torch.equal(call(), expected)
            assert torch.equal(call(), expected)


def test_changes_between_the_steps_of_a_generation(few: Tiny) -> None:
    """No forward runs then."""
    prompt = few.prompt(3, 5, few.grid, 5)

    def processor(ids: Tensor, scores: Tensor) -> Tensor:
        for change in CHANGES.values():
            is_refused(change, few.model, handle)
        return scores

    with enable(few, FEW) as handle:
        expected = generate(few, [prompt], 3).sequences
        assert torch.equal(generate(few, [prompt], 3, logits_processor=[processor]).sequences, expected)


class Held:
    """A call that stands still in a thread of its own, at ``place``, until ``go``.

    ``patience``: seconds until it must be there, if that is less than a minute only if it comes there at all.
    """

    def __init__(self, tiny: Tiny, place: str, call: Callable[[], Tensor], patience: float = 60) -> None:
        self._there, self._may_go = threading.Event(), threading.Event()
        self._results: list[Any] = []
        self._thread = threading.Thread(target=self._run, args=(PLACES[place](tiny.model), call))
        self._thread.start()
        assert self._there.wait(patience) or patience < 60

    def _run(self, module: Any, call: Callable[[], Tensor]) -> None:
        def stand() -> None:
            self._there.set()
            self._may_go.wait(60)

        with inside(module, stand):
            try:
                self._results.append(call())
            except BaseException as error:
                self._results.append(error)

    def go(self) -> Tensor:
        self._may_go.set()
        self._thread.join()
        (result,) = self._results
        assert isinstance(result, Tensor), repr(result)
        return result


@pytest.mark.parametrize("place", STATIONS)
def test_changes_from_another_thread(few: Tiny, place: str) -> None:
    """While a forward runs."""
    given = few.inputs([few.prompt(3, 5, few.grid, 5)])
    with enable(few, FEW) as handle:
        expected = few.model(**given).logits
        held = Held(few, place, lambda: few.model(**given).logits)
        for change in CHANGES.values():
            is_refused(change, few.model, handle)
        with handle.at(keep=0.4):  # goes meanwhile
            few.model(**given)
        assert torch.equal(held.go(), expected)
        assert torch.equal(few.model(**given).logits, expected)


def test_a_block_that_ends_while_another_thread_calls(few: Tiny) -> None:
    """It says so, and routing goes on until it is disabled."""
    given = few.inputs([few.prompt(3, 5, few.grid, 5)])
    handle = enable(few, FEW)
    handle.__enter__()
    expected = few.model(**given).logits
    held = Held(few, "a routed layer", lambda: few.model(**given).logits)
    with pytest.raises(RerouteError, match="forward or a generation of this model runs"):
        handle.__exit__(None, None, None)
    assert handle.is_enabled
    assert torch.equal(held.go(), expected)
    reroute.enable(few.model, keep=0.7)  # it is in no block any more
    assert not handle.is_enabled


def test_a_generation_in_another_thread(few: Tiny) -> None:
    """In its first forward; without a cache each step plans anew."""
    prompt = few.prompt(3, 5, few.grid, 5)
    with enable(few, FEW) as handle:
        for use_cache in (True, False):
            expected = generate(few, [prompt], 3, use_cache=use_cache).sequences
            held = Held(few, "a routed layer", lambda: generate(few, [prompt], 3, use_cache=use_cache).sequences)  # noqa: B023
            is_refused(CHANGES["enable"], few.model, handle)
            is_refused(CHANGES["disable"], few.model, handle)
            assert torch.equal(held.go(), expected)


def test_all_models_but_one_are_idle(few: Tiny) -> None:
    """None is disabled, and those that come are routed as before."""
    other, later = small("qwen" if few is small("llava") else "llava"), models.llava(layers=2, side=2)
    given, foreign = few.inputs([few.prompt(3, 5, few.grid, 5)]), other.inputs([other.prompt(3, 5, other.grid, 5)])
    plain = few.model(**given).logits, other.model(**foreign).logits
    reroute.enable(schedule=reroute.Schedule((1,), (0.25,)))
    expected = few.model(**given).logits, other.model(**foreign).logits
    handles = [reroute.handle_of(tiny.model) for tiny in (few, other)]
    held = Held(few, "a routed layer", lambda: few.model(**given).logits)
    for _ in range(2):
        with pytest.raises(RerouteError, match="forward or a generation of this model runs"):
            reroute.disable()
        assert [reroute.handle_of(tiny.model) for tiny in (few, other)] == handles
        assert torch.equal(other.model(**foreign).logits, expected[1])
    later.model(**later.inputs([later.prompt(3, 5, later.grid, 5)]))
    assert reroute.handle_of(later.model) is not None
    assert torch.equal(held.go(), expected[0])
    reroute.disable()
    assert torch.equal(few.model(**given).logits, plain[0])
    assert torch.equal(other.model(**foreign).logits, plain[1])


@pytest.mark.usefixtures("_hasty")
def test_a_block_of_each_thread(few: Tiny) -> None:
    """``with reroute.enable(…)`` in several threads: each call is routed by its own thread's settings, or refused."""
    given = few.inputs([few.prompt(3, 5, few.grid, 5)])
    plain, before = few.model(**given).logits, snapshot(few.model)
    budgets, counts = (0.4, 0.7, 0.9), Counter[str]()
    expected = {}
    for keep in budgets:
        with reroute.enable(few.model, keep=keep):
            expected[keep] = few.model(**given).logits

    def run(keep: float) -> None:
        for _ in range(12):
            try:
                with reroute.enable(few.model, keep=keep):
                    for _ in range(2):
                        right = torch.equal(few.model(**given).logits, expected[keep])
                        counts["right" if right else "wrong"] += 1
            except RerouteError:
                counts["refused"] += 1

    errors = together([functools.partial(run, keep) for keep in budgets])
    assert errors == [None] * 3
    assert counts["wrong"] == 0
    assert counts["right"] > 0
    reroute.disable(few.model)
    assert snapshot(few.model) == before
    assert torch.equal(few.model(**given).logits, plain)


@pytest.mark.parametrize("block", ["with enable", "at", "using"])
def test_a_model_is_not_taken_out_of_a_block(few: Tiny, block: str) -> None:
    """Its calls would go on with the settings of another one. Once the block has ended, it is free."""
    given = few.inputs([few.prompt(3, 5, few.grid, 5)])
    handle = enable(few, FEW)
    plan = handle.plan(given["input_ids"])
    blocks = {"with enable": lambda: handle, "at": lambda: handle.at(keep=0.4), "using": lambda: handle.using(plan)}
    with blocks[block]():
        expected = few.model(**given).logits
        before = snapshot(few.model)
        (error,) = together([lambda: reroute.enable(few.model, keep=0.7)])
        assert isinstance(error, RerouteError)
        assert "in a with block that has not ended" in str(error)
        with pytest.raises(RerouteError, match="in a with block that has not ended"):
            reroute.enable(few.model, keep=0.7)
        assert snapshot(few.model) == before
        assert reroute.handle_of(few.model) is handle
        assert torch.equal(few.model(**given).logits, expected)
    reroute.enable(few.model, keep=0.7).disable()


@pytest.mark.usefixtures("_hasty")
def test_routing_comes_and_goes_while_others_call(few: Tiny) -> None:
    """Each call is the plain one or the routed one, as a whole; none fails. Changes are made or refused."""
    sample = few.prompt(3, 5, few.grid, 5)
    given, counts, over = few.inputs([sample]), Counter[str](), threading.Event()
    plain, before = few.model(**given).logits, snapshot(few.model)
    settings: dict[str, Any] = {"schedule": schedule(FEW)}
    with reroute.enable(few.model, **settings):
        routed = few.model(**given).logits

    def change() -> None:
        try:
            for _ in range(150):
                for act in (lambda: reroute.enable(few.model, **settings), lambda: reroute.disable(few.model)):
                    try:
                        act()
                        counts["made"] += 1
                    except RerouteError:
                        counts["refused"] += 1
        finally:
            over.set()

    def call() -> None:
        while not over.is_set():
            logits = few.model(**given).logits
            known = {"plain": torch.equal(logits, plain), "routed": torch.equal(logits, routed)}
            counts[next((name for name, same in known.items() if same), "neither")] += 1

    errors = together([change, call, call])
    assert errors == [None] * 3
    assert counts["neither"] == 0
    reroute.disable(few.model)
    assert snapshot(few.model) == before
    assert torch.equal(few.model(**given).logits, plain)


LABELLED = small("llava").prompt(3, 5, (4, 4), 5)
CALLS: dict[str, Callable[[Tiny, dict[str, Tensor]], Tensor]] = {
    "model": lambda few, given: few.model(**given).logits,
    "forward": lambda few, given: few.model.forward(**given).logits,
    "labels": lambda few, given: few.model(**given, labels=labels_after(LABELLED, 22)).logits,
    "base": lambda few, given: few.model.model(**given).last_hidden_state,
    "generate": lambda few, given: torch.stack(generate(few, given, 2, use_cache=False).logits),
}


@pytest.mark.parametrize("way", CALLS)
def test_calls_while_settings_are_replaced(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait for the later settings, wherever the change is just then: none runs dense meanwhile."""
    few, call = small("llava"), CALLS[way]
    given = few.inputs([LABELLED])
    later: dict[str, Any] = {"schedule": reroute.Schedule((2,), (0.2,))}
    with reroute.enable(few.model, **later):
        expected = call(few, given)
    enable(few, FEW)
    threads: list[threading.Thread] = []
    results: list[Tensor] = []
    plain = intercept, router._forget_compiled

    def begin(number: int, *args: Any) -> Any:
        """As the plain function does; before, somebody calls, and comes as far as he can."""
        thread = threading.Thread(target=lambda: results.append(call(few, given)))
        thread.start()
        thread.join(0.05)
        threads.append(thread)
        return plain[number](*args)

    monkeypatch.setattr(router, "intercept", functools.partial(begin, 0))
    monkeypatch.setattr(router, "_forget_compiled", functools.partial(begin, 1))
    reroute.enable(few.model, **later)
    monkeypatch.undo()
    for thread in threads:
        thread.join()
    assert len(threads) == 10
    assert len(results) == len(threads)
    all_equal(results, expected)


def test_a_call_that_begins_while_all_models_are_disabled(few: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is plain, or nothing is disabled: what is asked for is done for all models or for none."""
    other = small("qwen" if few is small("llava") else "llava")
    given = few.inputs([few.prompt(3, 5, few.grid, 5)])
    handles = [enable(other, FEW), enable(few, FEW)]
    expected, helds = few.model(**given).logits, list[Held]()
    stop = process_wide.stop

    def late() -> None:
        helds.append(Held(few, "a routed layer", lambda: few.model(**given).logits, 0.3))
        stop()

    monkeypatch.setattr(process_wide, "stop", late)
    try:
        reroute.disable()
        left = False
    except RerouteError:
        left = True
    assert [handle.is_enabled for handle in handles] == [left, left]
    logits = helds[0].go()
    assert torch.equal(logits, expected) == left


@pytest.mark.parametrize("change", ["enable", "disable"])
def test_a_first_call_while_settings_of_all_models_change(
    few: Tiny, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """It made ready to be routed by the earlier ones: it is routed by what counts now, and so are all after it."""
    later: dict[str, Any] = {"schedule": reroute.Schedule((2,), (0.2,))}
    given = few.inputs([few.prompt(3, 5, few.grid, 5)])
    together = parallel.enabled_together

    def late(*args: Any) -> Any:
        made = together(*args)
        monkeypatch.undo()
        thread = threading.Thread(target=getattr(reroute, change), kwargs=later if change == "enable" else {})
        thread.start()
        thread.join()
        return made

    reroute.enable(schedule=schedule(FEW))
    monkeypatch.setattr(parallel, "enabled_together", late)
    logits = [few.model(**given).logits for _ in range(2)]
    handle = reroute.handle_of(few.model)
    assert (handle is None) == (change == "disable")
    assert handle is None or handle.totals().prefills == 2
    reroute.disable()
    assert "_reroute_met" not in vars(few.model)
    if handle is not None:
        reroute.enable(few.model, **later)
    all_equal(logits, few.model(**given).logits)


@pytest.mark.parametrize("block", ["at", "using"])
@pytest.mark.parametrize("change", ["enable", "disable"])
def test_blocks_of_a_handle_that_is_over(few: Tiny, block: str, change: str) -> None:
    """They were made before that, and begin after it: then their calls would be routed by others, or not at all."""
    given = few.inputs([few.prompt(3, 5, few.grid, 5)])
    handle = enable(few, FEW)
    plan = handle.plan(given["input_ids"])
    blocks: dict[str, Callable[[], Any]] = {"at": lambda: handle.at(keep=0.4), "using": lambda: handle.using(plan)}
    made = blocks[block]()
    CHANGES[change](few.model, handle)
    expected = few.model(**given).logits
    with pytest.raises(RerouteError, match="disabled"), made:
        pytest.fail("it began")
    with pytest.raises(RerouteError, match="disabled"):
        blocks[block]()
    assert torch.equal(few.model(**given).logits, expected)
