"""Two threads do whatever they like with a model: each call is right or refused with a sentence, and leaves nothing.

A step changes how a model is routed, opens or ends a block, makes a call or goes on with one. A call may pause in the
midst of a forward while the other thread acts, be interrupted there, or have other calls inside of it.
"""

from __future__ import annotations

import copy
import gc
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from calls import perform, stored
from conversations import Conversation, untouched
from draws import any_call, block_kinds, changes, lanes, later, moves, new, prompts, routings, subjects
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from lanes import Lane
from support import FAMILIES, generate, small
from verdicts import Call, plan_ahead
from world import Block, Plans, World
from world_settings import SETTINGS

import reroute

STEPS = int(os.environ.get("INTERLEAVINGS", "600"))
"""Of all families together. ``make weekly`` sets it."""

LONGEST, USUAL = 40, 34
"""Steps after which all begins anew: at most, and on average."""

HAPPENED: Counter[str] = Counter()
"""How often, in a run."""


class Interleavings(RuleBasedStateMachine):
    family = "llava"

    def __init__(self) -> None:
        super().__init__()
        tiny = untouched(self.family)  # and what a fault leaves on a model is not there when it is looked for again
        self.world = World(replace(tiny, model=copy.deepcopy(tiny.model)), self.family)

    def lane(self, number: int) -> Lane:
        """One that is free, if need be after its call has ended."""
        one, other = self.world.lanes[number], self.world.lanes[1 - number]
        if one.is_paused and not other.is_paused:
            return other
        self.end(number)
        return one

    def end(self, number: int) -> None:
        """The call of that lane, if one runs there."""
        while (lane := self.world.lanes[number]).is_paused:
            lane.go_on()

    def do(self, number: int, work: Callable[[Lane], Any]) -> None:
        lane = self.lane(number)
        lane.do(lambda: work(lane))

    @initialize(routing=routings, call=any_call(prompts))
    def first(self, routing: str, call: Call) -> None:
        """Most of what may happen needs a model that is routed, and a conversation."""
        self.do(0, lambda _: self.world.enable(self.world.subjects[0], SETTINGS[routing]))
        self.do(0, lambda lane: perform(self.world, lane, call))

    # --- calls ----------------------------------------------------------------------------------------------------

    @rule(lane=lanes, call=any_call(new))
    def begin(self, lane: int, call: Call) -> None:
        self.do(lane, lambda lane: perform(self.world, lane, call))

    @precondition(lambda self: self.world.conversation(0) is not None)
    @rule(lane=lanes, call=any_call(later))
    def follow(self, lane: int, call: Call) -> None:
        self.do(lane, lambda lane: perform(self.world, lane, call))

    @rule(first=any_call(pauses=True), second=any_call(pauses=True), order=st.permutations([0, 1]))
    def overlap(self, first: Call, second: Call, order: list[int]) -> None:
        """Two calls begin, then both end."""
        for number, call in enumerate((first, second)):
            self.end(number)
            self.do(number, lambda lane: perform(self.world, lane, call))  # noqa: B023
        for number in order:
            self.end(number)

    @precondition(lambda self: any(lane.is_paused for lane in self.world.lanes))
    @rule(number=lanes)
    def go_on(self, number: int) -> None:
        one, other = self.world.lanes[number], self.world.lanes[1 - number]
        (one if one.is_paused else other).go_on()

    # --- routing --------------------------------------------------------------------------------------------------

    @rule(lane=lanes, number=subjects, how=changes, routing=routings)
    def change(self, lane: int, number: int, how: str, routing: str) -> None:
        if how == "copy or drop a model":
            self.copy_or_drop_model(lane)
            return
        world, subject, settings = self.world, self.world.subject(number), SETTINGS[routing]

        def work(lane: Lane) -> None:
            if how == "enable everywhere":
                if all(one.is_enabled or world.can_begin(one) for one in world.subjects):
                    world.enable_everywhere(settings)
            elif how == "disable everywhere":
                world.disable_everywhere()
            elif how.startswith("disable"):
                world.disable(subject, by_handle=how == "disable by its handle")
            elif world.can_begin(subject):
                handle = world.enable(subject, settings)
                if handle is not None and how == "enable in a block":
                    world.open(lane, Block("handle", subject, handle, handle))
            world.check_old_handles()

        self.do(lane, work)

    def copy_or_drop_model(self, number: int) -> None:
        world, last = self.world, self.world.subjects[-1]
        if len(world.subjects) == 1:
            self.do(number, lambda _: world.copy_model(last))
            return
        holders: list[Any] = [*world.running, *(block for blocks in world.blocks.values() for block in blocks)]
        if not any(one.subject is last for one in holders):
            del last, holders
            world.drop_model()

    # --- blocks ---------------------------------------------------------------------------------------------------

    @rule(
        lane=lanes,
        kind=block_kinds,
        routing=routings,
        call=any_call(prompts),
        knows_labels=st.booleans(),
    )
    def block(self, lane: int, kind: str, routing: str, call: Call, knows_labels: bool) -> None:
        """Open one, or close the innermost one."""
        world, subject = self.world, self.world.subject(call.subject)

        def work(lane: Lane) -> None:
            if kind == "close" or len(world.blocks[lane]) > 1:
                if world.blocks[lane]:
                    world.close_block(lane)
            elif subject.handle is None:
                return
            elif kind == "settings":
                world.open_at(lane, subject, SETTINGS[routing])
            else:  # and make the call that was planned, since others are of another shape as a rule
                plans = Plans() if kind == "no plan" else plan_ahead(world, lane, replace(call, answer=knows_labels))
                world.open(lane, Block("using", subject, subject.handle, subject.handle.using(plans.plan), plans))
                perform(world, lane, call)

        self.do(lane, work)

    # --- caches ---------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.world.conversation(0) is not None)
    @rule(lane=lanes, how=moves, rows=st.tuples(lanes, lanes), count=st.integers(-2, 12), call=any_call(later))
    def handle_cache(self, lane: int, how: str, rows: tuple[int, int], count: int, call: Call) -> None:
        """And go on with it."""

        def work(lane: Lane) -> None:
            assert call.follows is not None
            talk = self.world.conversation(call.follows)
            if talk is None:
                return
            if how == "crop":
                self.crop(talk, count)
            elif how == "drop":
                self.world.conversations.remove(talk)
            elif not talk.is_broken:
                self.move(talk, how, [row % len(talk.rows) for row in rows])
            perform(self.world, lane, call)

        self.do(lane, work)

    def crop(self, talk: Conversation, count: int) -> None:
        if talk.is_broken:
            with self.world.refused("half filled"):
                talk.cache.crop(-count)
        elif talk.is_routed and not 0 <= count <= talk.length - talk.floor:
            before = stored(talk.cache)
            with self.world.refused("crop"):
                talk.cache.crop(-count)
            assert stored(talk.cache) == before
        elif 0 < count <= talk.tail and talk.spares(count):
            talk.cache.crop(-count)
            talk.crop(count)

    def move(self, talk: Conversation, how: str, order: list[int]) -> None:
        if how == "copy":
            self.world.add(replace(talk, cache=copy.deepcopy(talk.cache)))
            return
        if how == "reorder":
            del order[len(talk.rows) :]
            talk.cache.reorder_cache(torch.tensor(order))
        elif how == "select":
            talk.cache.batch_select_indices(torch.tensor(order))
        elif len(talk.rows) == 1:
            talk.cache.batch_repeat_interleave(2)
        else:
            return
        talk.move(order)

    # --- what must always be so -----------------------------------------------------------------------------------

    @invariant()
    def nothing_is_left_over(self) -> None:
        HAPPENED["steps"] += 1
        HAPPENED["steps while a call pauses"] += any(lane.is_paused for lane in self.world.lanes)
        self.world.check()

    def teardown(self) -> None:
        is_over = sys.exc_info()[0] is not None  # and why is known
        world = self.world
        try:
            for lane in world.lanes:
                while lane.is_paused:
                    self._try(lane.go_on, is_over)
            for lane in world.lanes:
                while world.blocks[lane]:
                    self._try(lambda: lane.do(lambda: world.close_block(lane)), is_over)  # noqa: B023
            self._try(world.disable_everywhere, is_over)
            self._try(world.check, is_over)
            assert is_over or world.leases == 0
        finally:
            for lane in world.lanes:
                lane.close()
            reroute.disable()
            HAPPENED.update(world.outcomes)

    @staticmethod
    def _try(work: Callable[[], Any], is_over: bool) -> None:
        try:
            work()
        except BaseException:
            if not is_over:
                raise


@pytest.fixture(autouse=True)
def _quick_collections() -> Iterator[None]:
    """Only what a test makes is looked at when garbage is collected."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("family", FAMILIES)
def test_any_interleaving(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reroute.config.DEFAULT_METHOD", "pdrop")  # the oracle ranks by attention alone
    tiny, share = small(family), STEPS // len(FAMILIES)
    generate(tiny, [tiny.prompt(0, 2, tiny.grid, 2)], 2)  # Transformers puts hooks of its own on a model that is used
    untouched(family)
    # Of another name, so that other examples are drawn where they are the same each time.
    machine = type(f"Interleavings_{family}", (Interleavings,), {"family": family, "__module__": __name__})
    examples = settings(
        max_examples=-(-share // USUAL),
        stateful_step_count=LONGEST,
        suppress_health_check=[HealthCheck.too_slow],
        database=None,
        phases=[Phase.generate, Phase.shrink],  # explanations see one thread only, and take their time
        report_multiple_bugs=False,
    )
    HAPPENED.clear()
    with warnings.catch_warnings(action="ignore"):
        run_state_machine_as_test(machine, settings=examples)
    for what, n in sorted(HAPPENED.items()):
        print(f"{n:6} {what}")
    # Else it would be a test of little.
    assert HAPPENED["steps"] > 0.8 * share
    assert all(HAPPENED[what] for what in ("plain", "routed", "after a routed prompt", "interrupted", "refused: busy"))
