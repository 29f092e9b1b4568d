"""What must come of a call: worked out before it is made, from what is true in the world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from conversations import NEW, Again, Conversation, Row, Say, left_of, sample_of
from lanes import Lane
from models import Sample
from oracle import Rules
from torch import Tensor
from world import Plans, World
from world_settings import rules_of

__all__ = ["Act", "Asked", "Call", "Verdict", "changes_nothing", "labels_of", "look_of", "plan_ahead"]

ANSWER, LONGEST = 2, 110


@dataclass(frozen=True)
class Act:
    """Something happens at a place: pause, interrupt, enable, disable, twin, or a call."""

    place: str
    what: Any
    nth: int = 0
    after: bool = False


@dataclass(frozen=True)
class Call:
    """``names``: the kind of the sample of each row. ``follows``: which conversation goes on, None for a new one.

    - ``way``: model, forward, base, decoder, generate.
    - ``answer``: whether there are labels, for the last tokens.
    - ``cache``: own (the model makes one), given (an empty one), none.
    - ``at``: settings for this call alone.
    - ``listener``: whether what is told of the prefill raises.
    """

    way: str
    names: tuple[str, ...]
    subject: int = 0
    follows: int | None = None
    side: str = "left"
    answer: bool = False
    cache: str = "own"
    positions: bool = True
    spelling: str = "all"
    at: str | None = None
    listener: bool = False
    acts: tuple[Act, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """``refusal``: a name in REFUSALS. ``rules``: None for a plain call. ``is_recorded``: in stats, if it succeeds.

    ``again``: whether it chooses again; ``look``: the layer whose states the cache keeps from then on.
    """

    refusal: str | None = None
    rules: Rules | None = None
    queries: tuple[int | None, ...] = ()
    is_recorded: bool = False
    again: bool = False
    look: int | None = None


def look_of(rules: Rules) -> int:
    return rules.layers[0] + rules.score_layer_offset


def changes_nothing(rules: Rules | None) -> bool:
    return rules is None or set(rules.ratios) == {1.0}


def labels_of(given: dict[str, Tensor]) -> Tensor:
    """The last tokens of each row are its answer."""
    ids = given["input_ids"]
    mask = given["attention_mask"][:, -ids.shape[1] :]
    later = mask.flip(1).cumsum(1).flip(1)  # how many tokens from here on
    return ids.masked_fill((mask == 0) | (later > ANSWER), -100)


def plan_ahead(world: World, lane: Lane, call: Call) -> Plans:
    """A plan of a prompt, by the settings that count in ``lane``."""
    subject = world.subject(call.subject)
    _, samples = _samples(world, call.names, len(call.names))
    given = subject.tiny.inputs(samples, call.side)
    labels = labels_of(given) if call.answer else None
    plan = subject.handle.plan(given["input_ids"], given["attention_mask"], labels=labels)
    rules = rules_of(world.settings(lane, subject), world.family)
    if not any(sample.visual for sample in samples):
        rules = None
    assert (plan is None) == (rules is None)
    queries = tuple(len(sample) - 1 - ANSWER * call.answer for sample in samples)
    return Plans() if plan is None else Plans(plan, _shape(samples, call.side), rules, queries, call.answer)


def _samples(world: World, names: Sequence[str], rows: int) -> tuple[list[str], list[Sample]]:
    numbered = [f"{names[b % len(names)]}{b}" for b in range(rows)]
    return numbered, [sample_of(world.family, name) for name in numbered]


def _shape(samples: Sequence[Sample], side: str) -> tuple[Any, ...]:
    shapes = [(len(sample), sample.visual) for sample in samples]
    return (*shapes, side if len({length for length, _ in shapes}) > 1 else "")


class Asked:
    """A call that is asked for in ``lane``."""

    def __init__(self, world: World, lane: Lane, call: Call) -> None:
        self.world, self.lane, self.call = world, lane, call
        self.subject = world.subject(call.subject)
        self.tiny = self.subject.tiny
        self.conversation: Conversation | None = None if call.follows is None else world.conversation(call.follows)
        rows = len(call.names) if self.conversation is None else len(self.conversation.rows)
        self.names, self.samples = _samples(world, call.names, rows)
        self.length = max(map(len, self.samples))
        self.is_labelled = call.answer and call.way in ("model", "forward") and min(map(len, self.samples)) > ANSWER

    @property
    def past(self) -> int:
        return 0 if self.conversation is None else self.conversation.length

    def is_possible(self) -> bool:
        """Whether it is a call that the plain model could take."""
        call, talk = self.call, self.conversation
        follows = all(name in NEW for name in call.names)
        if (talk is not None) != follows or self.past > LONGEST:
            return False
        if call.way == "decoder":
            has_no_picture = not any(sample.visual for sample in self.samples)
            return has_no_picture and (talk is None or talk.is_routed or talk.is_broken)
        return call.way != "generate" or talk is None or not (talk.is_broken or call.cache == "none")

    def verdict(self) -> Verdict | None:
        """None if what is asked for is an error of the test's own."""
        subject, talk = self.subject, self.conversation
        if talk is not None and talk.is_broken:
            return Verdict("half filled")
        if not subject.is_enabled or self.call.way == "decoder":
            return Verdict("without routing" if talk is not None and talk.is_routed else None)
        plans = self.plans()
        verdict = self._by_settings() if plans is None else self._by_plan(plans)
        if verdict is None or verdict.refusal is not None or changes_nothing(verdict.rules):
            return verdict
        assert verdict.rules is not None
        is_renumbered = verdict.rules.position_mode == "renumbered" or (talk is not None and talk.is_renumbered)
        past = talk.start if talk is not None and verdict.again else self.past
        if past and is_renumbered:
            return Verdict("renumbered")
        keeps = self.reopens and (verdict.again or talk is None or not talk.is_routed)
        return replace(verdict, look=look_of(verdict.rules) if keeps else None)

    @property
    def reopens(self) -> bool:
        """Whether the settings that count let later turns choose again."""
        return bool(self.world.settings(self.lane, self.subject).get("reopens"))

    def plans(self) -> Plans | None:
        """Those in use, which steps of a decode go on without."""
        is_step = self.length == 1 and self.past > 0
        plans: Plans | None = self.world.innermost(self.lane, self.subject, "using")
        return None if is_step else plans

    def _by_settings(self) -> Verdict:
        rules = rules_of(self.world.settings(self.lane, self.subject), self.world.family)
        talk, is_turn = self.conversation, self.length > 1 or self.call.way == "generate"
        if self.reopens and is_turn and talk is not None and talk.is_routed and not changes_nothing(rules):
            assert rules is not None
            return self._again(talk, rules)
        if not any(sample.visual for sample in self.samples):
            return Verdict()
        queries = tuple(len(sample) - 1 - ANSWER * self.is_labelled for sample in self.samples)
        return Verdict(None, rules, queries, rules is not None)

    def _again(self, talk: Conversation, rules: Rules) -> Verdict:
        if not talk.has_states or talk.look != look_of(rules):
            return Verdict("no states")
        if any(None in row[: talk.start] for row in talk.columns):
            return Verdict("padded text")
        samples = [left_of(self.world.family, row) for row in self.since(talk)]
        if not any(sample.visual for sample in samples):
            return Verdict()
        queries = tuple(len(sample) - 1 - ANSWER * self.is_labelled for sample in samples)
        return Verdict(None, rules, queries, is_recorded=True, again=True)

    def since(self, talk: Conversation) -> list[Row]:
        """Per row what was said since states are kept, with this call."""
        return [(*row[talk.began :], Say(name)) for row, name in zip(talk.rows, self.names, strict=True)]

    def _by_plan(self, plans: Plans) -> Verdict | None:
        plan = plans.plan
        if plan is None:
            return Verdict()
        if (len(self.samples), self.length, self.past) != (plan.batch, plan.length, 0):
            return Verdict("shape")
        if _shape(self.samples, self.call.side) != plans.shape:
            return None
        if self.is_labelled and not plans.knows_labels and not changes_nothing(plans.rules):
            return Verdict("labels")
        return Verdict(None, plans.rules, plans.queries, is_recorded=True)

    def rows(self, verdict: Verdict) -> list[Row]:
        """What each row has been told once the call has succeeded."""
        before: list[Row] = [()] * len(self.samples) if self.conversation is None else self.conversation.rows
        rules = None if changes_nothing(verdict.rules) else verdict.rules
        if verdict.again and (talk := self.conversation) is not None:
            said_since = zip(before, self.since(talk), verdict.queries, strict=True)
            return [(*row[: talk.began], self._said_again(since, rules, query)) for row, since, query in said_since]
        queries = verdict.queries or (None,) * len(before)
        said = [
            Say(name, rules, query) if sample.visual and rules else Say(name)
            for name, sample, query in zip(self.names, self.samples, queries, strict=True)
        ]
        return [(*row, say) for row, say in zip(before, said, strict=True)]

    def _said_again(self, events: Row, rules: Rules | None, query: int | None) -> Again:
        assert query is not None
        has_picture = bool(left_of(self.world.family, events).visual)
        return Again(events, rules if has_picture else None, query)
