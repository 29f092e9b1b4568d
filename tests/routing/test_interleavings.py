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
from calls import ALL_PLACES, perform, stored
from conversations import PROMPTS, untouched
from hypothesis import HealthCheck, settings
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
from verdicts import Act, Call, plan_ahead
from world import SETTINGS, Block, Plans, World

import reroute
from reroute.errors import RerouteError

STEPS = int(os.environ.get("INTERLEAVINGS", "2000"))
"""Of all families together. ``make weekly`` sets it."""

LONGEST, USUAL = 40, 30
"""Steps after which all begins anew: at most, and on average."""

HAPPENED: Counter[str] = Counter()
"""How often, in a run."""

# --- what may be drawn --------------------------------------------------------------------------------------------

lanes, few = st.integers(0, 1), st.integers(0, 3)
pairs = st.tuples(lanes, lanes)
subjects = st.sampled_from([0, 0, 0, 1])
routings = st.sampled_from([*SETTINGS, "pyramid", "growing", "renumbered"])
prompts = st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=2).map(tuple)
more = st.sampled_from([("one",), ("three",), ("picture",), ("talk",), ("picture", "talk"), ("talk", "picture")])
MOVES = ("reorder", "select", "repeat", "copy", "drop")
ways = st.sampled_from(["model", "model", "forward", "base", "decoder"])


def acts(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Act, ...]]:
    what = st.one_of(
        st.just("pause"), st.just("pause"), st.just("interrupt"), st.sampled_from(["enable", "disable"]), inner
    )
    one = st.builds(Act, st.sampled_from(list(ALL_PLACES)), what, st.sampled_from([0, 0, 0, 1, 2]), st.booleans())
    return st.one_of(st.just(()), st.lists(one, min_size=1, max_size=2).map(tuple))


def calls(acts: st.SearchStrategy[tuple[Act, ...]]) -> dict[str, st.SearchStrategy[Call]]:
    shared: dict[str, Any] = {
        "subject": subjects,
        "at": st.one_of(st.none(), st.none(), routings),
        "listener": st.sampled_from([False] * 7 + [True]),
        "acts": acts,
    }
    sides, caches = st.sampled_from(["left", "left", "right"]), st.sampled_from(["own", "given", "none"])
    new = st.builds(
        Call, ways, prompts, side=sides, answer=st.booleans(), cache=caches, positions=st.booleans(), **shared
    )
    following = st.builds(Call, ways, more, follows=few, answer=st.booleans(), **shared)
    generations = st.one_of(
        st.builds(Call, st.just("generate"), prompts, cache=st.sampled_from(["own", "none"]), **shared),
        st.builds(Call, st.just("generate"), more, follows=few, spelling=st.sampled_from(["all", "new"]), **shared),
    )
    return {"new": new, "following": following, "generations": generations}


def any_of(strategies: dict[str, st.SearchStrategy[Call]]) -> st.SearchStrategy[Call]:
    return st.one_of(*strategies.values())


CALLS = calls(acts(any_of(calls(acts(any_of(calls(st.just(()))))))))


class Interleavings(RuleBasedStateMachine):
    family = "llava"

    def __init__(self) -> None:
        super().__init__()
        self.world = World(small(self.family), self.family)

    def lane(self, number: int) -> Lane:
        """One that is free, if need be after its call has ended."""
        one, other = self.world.lanes[number], self.world.lanes[1 - number]
        if one.is_paused and not other.is_paused:
            return other
        while one.is_paused:
            one.go_on()
        return one

    def do(self, number: int, work: Callable[[Lane], Any]) -> None:
        lane = self.lane(number)
        lane.do(lambda: work(lane))

    @initialize(routing=st.one_of(st.none(), routings, routings), call=CALLS["new"])
    def first(self, routing: str | None, call: Call) -> None:
        """Most of what may happen needs a model that is routed, and a conversation."""
        if routing is not None:
            self.do(0, lambda _: self.world.enable(self.world.subjects[0], SETTINGS[routing]))
        self.do(0, lambda lane: perform(self.world, lane, call))

    # --- calls ----------------------------------------------------------------------------------------------------

    @rule(lane=lanes, call=CALLS["new"])
    def begin(self, lane: int, call: Call) -> None:
        self.do(lane, lambda lane: perform(self.world, lane, call))

    @precondition(lambda self: self.world.conversation(0) is not None)
    @rule(lane=lanes, call=CALLS["following"])
    def follow(self, lane: int, call: Call) -> None:
        self.do(lane, lambda lane: perform(self.world, lane, call))

    @precondition(lambda self: self.world.conversation(0) is not None)
    @rule(lane=lanes, call=CALLS["following"])
    def follow_again(self, lane: int, call: Call) -> None:
        self.do(lane, lambda lane: perform(self.world, lane, call))

    @rule(lane=lanes, call=CALLS["generations"])
    def generate(self, lane: int, call: Call) -> None:
        self.do(lane, lambda lane: perform(self.world, lane, call))

    @precondition(lambda self: any(lane.is_paused for lane in self.world.lanes))
    @rule(number=lanes)
    def go_on(self, number: int) -> None:
        one, other = self.world.lanes[number], self.world.lanes[1 - number]
        (one if one.is_paused else other).go_on()

    # --- routing --------------------------------------------------------------------------------------------------

    @rule(lane=lanes, number=subjects, routing=routings, with_block=st.sampled_from([False, False, True]))
    def enable(self, lane: int, number: int, routing: str, with_block: bool) -> None:
        world, subject = self.world, self.world.subject(number)

        def work(lane: Lane) -> None:
            if not world.can_begin(subject):
                return
            handle = world.enable(subject, SETTINGS[routing])
            if handle is not None and with_block:
                world.open(lane, Block("handle", subject, handle, handle))

        self.do(lane, work)

    @precondition(lambda self: any(subject.is_enabled for subject in self.world.subjects))
    @rule(lane=lanes, number=subjects, how=st.sampled_from(["function", "handle", "everywhere"]))
    def disable(self, lane: int, number: int, how: str) -> None:
        world, subject = self.world, self.world.subject(number)

        def work(_: Lane) -> None:
            if how == "everywhere":
                world.disable_everywhere()
            else:
                world.disable(subject, by_handle=how == "handle")
            for handle in world.old_handles:
                handle.disable()
                for use in (lambda: handle.at(keep=0.5), lambda: handle.using(None), handle.__enter__):  # noqa: B023
                    with pytest.raises(RerouteError, match="Routing of this model was disabled"):
                        use()

        self.do(lane, work)

    @precondition(lambda self: not all(subject.is_enabled for subject in self.world.subjects))
    @rule(lane=lanes, routing=routings)
    def enable_everywhere(self, lane: int, routing: str) -> None:
        def work(_: Lane) -> None:
            if all(subject.is_enabled or self.world.can_begin(subject) for subject in self.world.subjects):
                self.world.enable_everywhere(SETTINGS[routing])

        self.do(lane, work)

    # --- blocks ---------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.world.subjects[0].is_enabled)
    @rule(lane=lanes, number=subjects, routing=routings)
    def open_settings(self, lane: int, number: int, routing: str) -> None:
        subject = self.world.subject(number)
        if subject.handle is not None:
            self.do(lane, lambda lane: self.world.open_at(lane, subject, SETTINGS[routing]))

    @precondition(lambda self: self.world.subjects[0].is_enabled)
    @rule(lane=lanes, call=CALLS["new"], is_empty=st.sampled_from([True, False, False]), knows_labels=st.booleans())
    def open_plan(self, lane: int, call: Call, is_empty: bool, knows_labels: bool) -> None:
        """And make a call in it: others have another shape as a rule."""
        world, subject = self.world, self.world.subject(call.subject)

        def work(lane: Lane) -> None:
            plans = Plans() if is_empty else plan_ahead(world, lane, replace(call, answer=knows_labels))
            world.open(lane, Block("using", subject, subject.handle, subject.handle.using(plans.plan), plans))
            perform(world, lane, call)

        if subject.handle is not None:
            self.do(lane, work)

    @precondition(lambda self: any(self.world.blocks.values()))
    @rule(number=lanes)
    def close_block(self, number: int) -> None:
        """Of that lane, or else of the other one; not in the midst of a call."""
        here = [lane for lane in self.world.lanes if self.world.blocks[lane] and not lane.is_paused]
        if here:
            lane = here[number % len(here)]
            lane.do(lambda: self.world.close_block(lane))

    # --- caches and copies ----------------------------------------------------------------------------------------

    @precondition(lambda self: self.world.conversation(0) is not None)
    @rule(lane=lanes, number=few, count=st.integers(-2, 12))
    def crop(self, lane: int, number: int, count: int) -> None:
        def work(_: Lane) -> None:
            talk = self.world.conversation(number)
            if talk is None:
                return
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

        self.do(lane, work)

    @precondition(lambda self: self.world.conversation(0) is not None)
    @rule(lane=lanes, number=few, how=st.sampled_from(MOVES), rows=pairs)
    def move(self, lane: int, number: int, how: str, rows: tuple[int, int]) -> None:
        def work(_: Lane) -> None:
            talk = self.world.conversation(number)
            if talk is None or (talk.is_broken and how != "drop"):
                return
            order = [row % len(talk.rows) for row in rows]
            if how == "reorder":
                del order[len(talk.rows) :]
                talk.cache.reorder_cache(torch.tensor(order))
            elif how == "select":
                talk.cache.batch_select_indices(torch.tensor(order))
            elif how == "repeat" and len(talk.rows) == 1:
                talk.cache.batch_repeat_interleave(2)
            elif how == "copy":
                self.world.add(replace(talk, cache=copy.deepcopy(talk.cache)))
            elif how == "drop":
                self.world.conversations.remove(talk)
            if how in ("reorder", "select", "repeat") and (how != "repeat" or len(talk.rows) == 1):
                talk.move(order)

        self.do(lane, work)

    @rule(lane=lanes)
    def copy_or_drop_model(self, lane: int) -> None:
        world, last = self.world, self.world.subjects[-1]
        if len(world.subjects) == 1:
            self.do(lane, lambda _: world.copy_model(last))
            return
        holders: list[Any] = [*world.running, *(block for blocks in world.blocks.values() for block in blocks)]
        if not any(one.subject is last for one in holders):
            del last, holders
            world.drop_model()

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
            assert is_over or world.pool.stats().leases == 0
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
def test_any_interleaving(family: str) -> None:
    tiny, share = small(family), STEPS // len(FAMILIES)
    generate(tiny, [tiny.prompt(0, 2, tiny.grid, 2)], 2)  # Transformers puts hooks of its own on a model that is used
    untouched(family)
    machine = type("Interleavings", (Interleavings,), {"family": family})
    machine.__module__ = __name__
    examples = settings(
        max_examples=-(-share // USUAL),
        stateful_step_count=LONGEST,
        suppress_health_check=list(HealthCheck),
        database=None,
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
