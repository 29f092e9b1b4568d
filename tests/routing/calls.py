"""Calls of a model in a world: what each has given, or was refused for, and what it leaves behind."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from conversations import Conversation, Expected, Row, Say, expected
from lanes import Frame, Happening, Interrupt, Lane
from models import CACHE
from support import PLACES, cache_of, close, generate, kv_lengths
from torch import Tensor, nn
from transformers import DynamicCache
from verdicts import Act, Asked, Call, Verdict, changes_nothing, labels_of
from world import Running, World
from world_settings import REFUSALS, SETTINGS

from reroute.errors import RerouteError

__all__ = ["ALL_PLACES", "perform", "stored"]

LAST = "the MLP of the last layer"
ALL_PLACES: dict[str, Callable[[Any], nn.Module]] = {
    **PLACES,
    LAST: lambda model: model.model.language_model.layers[4].mlp,
}
TOKENS = 2
"""That are generated."""


class _Performance(Asked):
    """A call that is made."""

    def __init__(self, world: World, lane: Lane, call: Call) -> None:
        super().__init__(world, lane, call)
        self.frame = Frame(lane)
        self.was_interrupted, self.was_told, self.heads = False, False, 0

    # --- the call -------------------------------------------------------------------------------------------------

    def given(self) -> dict[str, Any]:
        call, talk = self.call, self.conversation
        if talk is None:
            positions = call.positions or call.cache != "none"  # those of later turns go on from these
            given: dict[str, Any] = self.tiny.inputs(self.samples, call.side, positions=positions)
            if call.way == "generate":
                given = self.tiny.inputs(self.samples)
        else:
            given = talk.follow(self.tiny, self.samples)
            if call.way == "generate" and call.spelling == "all":
                given["input_ids"] = torch.cat([talk.ids(), given["input_ids"]], dim=1)
                if "mm_token_type_ids" in given:
                    kinds = torch.isin(talk.ids(), torch.tensor([self.tiny.model.config.image_token_id]))
                    given["mm_token_type_ids"] = torch.cat([kinds.long(), given["mm_token_type_ids"]], dim=1)
        return given

    def run(self, given: dict[str, Any], cache: Any) -> Any:
        model, way = self.tiny.model, self.call.way
        if way == "decoder":
            kept = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
            return model.model.language_model(**kept, **({CACHE: cache} if cache is not None else {}))
        if cache is not None:
            given = {**given, CACHE: cache}
        given["use_cache"] = self.call.cache != "none"
        if way == "generate":
            return generate(self.tiny, given, TOKENS)
        if self.is_labelled:
            given["labels"] = labels_of(given)
        functions = {"model": model, "forward": model.forward, "base": model.model}
        return functions[way](**given)

    def perform(self) -> None:
        world, call, talk = self.world, self.call, self.conversation
        is_whole = call.way in ("model", "generate")  # which is what ``enable()`` waits for
        is_possible = self.is_possible() and (not is_whole or world.meet(self.subject))
        verdict = self.verdict() if is_possible else None
        if verdict is None:
            world.outcomes["impossible"] += 1
            return
        is_plain = not self.subject.is_enabled or call.way == "decoder"
        running = Running(self.lane, self.subject, call.way == "generate", is_plain)
        given = self.given()
        cache = DynamicCache() if talk is None and call.cache == "given" else None if talk is None else talk.cache
        before = stored(cache)
        output, refusal = self.make(running, given, cache)
        self.record(verdict, running, has_ended=output is not None)
        if refusal is not None:
            self.was_refused(verdict, refusal)
            assert stored(cache) == before or call.way == "generate"
        elif output is None:
            self.was_cut_short(verdict, cache, before)
        else:
            self.has_succeeded(verdict, output, given)

    def make(self, running: Running, given: dict[str, Any], cache: Any) -> tuple[Any, str | None]:
        """The output, or why it is refused, or neither."""
        talk, running_ones = self.conversation, self.world.running
        if talk is not None:
            talk.is_busy = True
        running_ones.append(running)
        try:
            with self.listening(running), self.frame.watching(self.happenings(running)):
                return self.run(dict(given), cache), None
        except Interrupt:
            return None, None
        except RerouteError as error:
            return None, str(error)
        finally:
            running_ones.remove(running)
            if talk is not None:
                talk.is_busy = False

    @contextmanager
    def listening(self, running: Running) -> Iterator[None]:
        """What is told of the prefill of this call raises, if it shall."""

        def listener(_: Any) -> None:
            if threading.get_ident() == self.lane.ident and self.lane.frames[-1] is self.frame:
                self.was_told = True
                raise Interrupt

        with ExitStack() as stack:
            if self.call.listener and running.handle is not None:
                stack.callback(running.handle.on_prefill(listener))
            yield

    def happenings(self, running: Running) -> list[Happening]:
        def count() -> None:
            self.heads += 1

        happenings = [Happening(self.tiny.model.lm_head, count, nth=None)]
        for act in self.call.acts:
            module, what = ALL_PLACES[act.place](self.tiny.model), partial(self.act, act, running)
            happenings.append(Happening(module, what, act.nth, act.after))
        return happenings

    def act(self, act: Act, running: Running) -> None:
        world, subject = self.world, self.subject
        if act.what == "interrupt":
            self.was_interrupted = True
            raise Interrupt
        with world.keeping_deltas():
            if act.what == "pause":
                running.place = act.place
                self.lane.pause()
                running.place = None
            elif isinstance(act.what, Call):
                perform(world, self.lane, act.what)
            elif act.what == "twin":
                perform(world, self.lane, self.twin())
            elif running.handle is not None:  # a plain call may become a routed one
                if act.what == "enable":
                    world.enable(subject, SETTINGS["half"])
                else:
                    world.disable(subject)

    def twin(self) -> Call:
        """Of the same prompt: what belongs to this call would fit it."""
        cache = "none" if self.conversation is None else "own"
        return replace(self.call, way="base", answer=False, cache=cache, at=None, listener=False, acts=())

    # --- what came of it ------------------------------------------------------------------------------------------

    def record(self, verdict: Verdict, running: Running, *, has_ended: bool) -> None:
        """How many prefills must be in the handle's totals now."""
        if self.was_told:
            count = 1
        elif self.call.way == "base":
            count = int(has_ended)
        elif self.call.way == "generate" and self.call.cache != "none":
            count = min(1, self.heads)
        else:
            count = self.heads
        if verdict.is_recorded and count:
            self.world.recorded[id(running.handle), self.lane.ident] += count

    def was_refused(self, verdict: Verdict, sentence: str) -> None:
        reason = verdict.refusal
        plans = self.world.innermost(self.lane, self.subject, "using")
        if reason is None and self.call.way == "generate" and plans is not None and plans.plan is not None:
            reason = "shape" if self.call.cache == "none" else None  # the second forward has one more token
        assert reason is not None, f"refused without need: {sentence}"
        assert REFUSALS[reason] in sentence
        self.world.outcomes[f"refused: {reason}"] += 1

    def was_cut_short(self, verdict: Verdict, cache: Any, before: list[int]) -> None:
        assert self.was_interrupted or self.was_told
        self.world.outcomes["interrupted"] += 1
        talk = self.conversation
        if self.call.way in ("generate", "decoder"):
            self.forget()
            return
        if cache is None or (after := stored(cache)) == before:
            return
        is_watched = not changes_nothing(verdict.rules) or (talk is not None and talk.is_routed)
        if is_watched and not self.heads and not self.was_told:  # the base model has not ended
            if talk is None:
                talk = self.remember(verdict, cache, self.rows(verdict))
            talk.is_broken = True
        elif len(after) == self.tiny.num_layers and all(map(operator.ne, after, before or [0] * len(after))):
            self.remember(verdict, cache, self.rows(verdict))
        else:
            self.forget()

    def has_succeeded(self, verdict: Verdict, output: Any, given: dict[str, Any]) -> None:
        assert verdict.refusal is None, f"not refused: {verdict.refusal}"
        assert not self.was_interrupted
        is_later = self.conversation is not None and self.conversation.is_routed
        plain = "after a routed prompt" if is_later else "plain"
        routed = "routed again" if verdict.again else "routed"
        self.world.outcomes[plain if changes_nothing(verdict.rules) else routed] += 1
        rows = self.rows(verdict)
        steps: list[list[int]] = [[] for _ in rows]
        if self.call.way == "generate":
            steps = output.sequences[:, -TOKENS:].tolist()
            rows = [(*row, *(Say((t,)) for t in tokens[:-1])) for row, tokens in zip(rows, steps, strict=True)]
        results = [expected(self.world.family, row) for row in rows]
        if not all(result.is_defined for result in results):
            self.world.outcomes["undefined"] += 1
            self.forget()
            return
        self.compare(output, given["attention_mask"].bool(), results)
        if self.call.cache == "none" or self.call.way == "decoder":
            return
        cache = cache_of(output)
        talk = self.remember(verdict, cache, rows, steps)
        assert cache.get_seq_length() == talk.length
        if len(rows) == 1:
            assert kv_lengths(cache) == results[0].kept

    def compare(self, output: Any, mask: Tensor, results: Sequence[Expected]) -> None:
        if self.call.way == "generate":
            logits = list(torch.stack(output.logits, 1))
        elif self.call.way in ("base", "decoder"):
            logits = list(nn.functional.linear(output.last_hidden_state, self.tiny.model.lm_head.weight))
        else:
            logits = list(output.logits)
        for row, valid, result in zip(logits, mask, results, strict=True):
            live = row if self.call.way == "generate" else row[valid[-len(row) :]]
            close(live, result.logits[-len(live) :])

    def remember(
        self, verdict: Verdict, cache: Any, rows: list[Row], steps: Sequence[Sequence[int]] = ()
    ) -> Conversation:
        """The cache has taken the tokens of the call."""
        talk, length, past = self.conversation, self.length, self.past
        side = "left" if self.call.way == "generate" else self.call.side
        if talk is None:
            talk = Conversation(self.world.family, cache, [], [[] for _ in rows])
            self.world.add(talk)
        had_states, before = talk.has_states, len(talk.rows[0]) if talk.rows else 0
        talk.rows, talk.columns = rows, list(talk.columns)  # copies share them
        tail = [length]
        for b, sample in enumerate(self.samples):
            padding: list[int | None] = [None] * (length - len(sample))
            ids = [*padding, *sample.ids] if side == "left" else [*sample.ids, *padding]
            talk.columns[b] = [*talk.columns[b], *ids, *(steps[b][:-1] if steps else ())]
            if sample.visual:
                tail.append(length - 1 - sample.visual[-1] - (len(padding) if side == "left" else 0))
        more = len(steps[0]) - 1 if steps and steps[0] else 0
        talk.tail = (talk.tail + length if min(tail) == length else min(tail)) + more
        is_text = not any(sample.visual for sample in self.samples)
        if not changes_nothing(verdict.rules):
            assert verdict.rules is not None
            is_renumbered = verdict.rules.position_mode == "renumbered"
            talk.is_renumbered = is_renumbered or (talk.is_renumbered and not verdict.again)
            talk.is_routed, talk.look = True, verdict.look
            if not verdict.again:
                talk.began, talk.start = before, past
            talk.floor = talk.last_picture() if verdict.again else talk.length - more - min(tail)
        if talk.look is not None and (not changes_nothing(verdict.rules) or (had_states and is_text)):
            talk.kept = talk.length
        return talk

    def forget(self) -> None:
        if self.conversation is not None:
            self.world.conversations.remove(self.conversation)


def perform(world: World, lane: Lane, call: Call) -> None:
    """Make ``call`` in ``lane``, whose thread this is, and check what comes of it."""
    subject = world.subject(call.subject)
    if call.at is None or subject.handle is None:
        _Performance(world, lane, call).perform()
    elif world.open_at(lane, subject, SETTINGS[call.at]):
        _Performance(world, lane, call).perform()
        world.close_block(lane)


def stored(cache: Any) -> list[int]:
    layers = [] if cache is None else cache.layers
    return [0 if layer.keys is None else int(layer.keys.shape[-2]) for layer in layers]
