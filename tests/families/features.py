"""What a routed model is used for, each way once for any type: against the dense oracle, or refused with a sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from attentions import FLASH, FLEX, attention_of
from cache_kinds import KINDS, offload_on_cpu
from dense import NEAR, OF_STATES, Predicted, near, predict
from models import CACHE
from test_types import ONE, TWO, batch, plan, step
from test_windows import talk
from tiny_types import PICTURE, RECURRENT, SLIDING, build
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

import reroute

__all__ = ["FEATURES", "Feature", "Routed"]

ANSWER = (7, 11, 13)
MARGIN = 1e-6


@dataclass(eq=False)
class Routed:
    """A type that routes, and the same one without: ``predict`` says what is right."""

    kind: str
    action: str = "route"
    attention: str = "eager"

    def __post_init__(self) -> None:
        some = self.kind in SLIDING or self.kind in RECURRENT  # that may decide at few layers only
        self.layers: tuple[int, ...] = (2, 6) if some else (3, 4, 5)
        self.ratios: tuple[float, ...] = (0.4, 0.7) if some else (0.6, 0.3, 0.5)
        if self.action == "remove":
            self.ratios = tuple(sorted(self.ratios, reverse=True))
        depth = 8 if some else 6
        self.dense, self.tiny = build(self.kind, layers=depth), build(self.kind, self.attention, layers=depth)

    @contextlib.contextmanager
    def on(self, **settings: Any) -> Iterator[Any]:
        """A handle."""
        schedule = reroute.Schedule(self.layers, self.ratios)
        enable: Any = reroute.enable
        with enable(self.tiny.model, schedule=schedule, action=self.action, **settings) as handle:
            yield handle

    def predict(self, ids: list[int], *, after: tuple[int, ...] = (), chosen: Any = None) -> Predicted:
        """The oracle's answer to a prompt, and to what is generated after it."""
        said = [*ids, *after]
        found = predict(self.dense, said, self.layers, self.ratios, prompt=len(ids), action=self.action, chosen=chosen)
        assert found.margin > MARGIN, "choose another seed: this selection is a matter of rounding"
        return found

    def near(self, actual: Tensor, expected: Tensor) -> None:
        """Equal but for rounding, by what the layers of the type round."""
        near(actual, expected, share=OF_STATES if self.kind in RECURRENT else NEAR)

    def check(self, logits: Tensor, expected: Predicted) -> None:
        """Check the last of ``logits``, as many as were predicted."""
        self.near(logits[-len(expected.logits) :], expected.logits)

    def cache(self) -> Any:
        return DynamicCache(config=self.tiny.text.config)


Feature = Callable[[str, pytest.MonkeyPatch], None]


def _answer(routed: Routed, cache: Any = None) -> None:
    """A batch, and tokens after it."""
    samples = (ONE, TWO)
    cache = routed.cache() if cache is None else cache
    given = batch(routed.tiny, *samples)
    with routed.on() as handle:
        with handle.using(plan(handle, given)):
            logits = [routed.tiny.model(**given, **{CACHE: cache}, use_cache=True).logits]
        for token in ANSWER:
            inputs = step(routed.tiny, given, token, cache)
            logits.append(routed.tiny.model(**inputs, use_cache=True).logits)
            given = {name: inputs[name] for name in ("attention_mask", "position_ids")}
    for b, ids in enumerate(samples):
        routed.check(torch.cat(logits, 1)[b], routed.predict(ids, after=ANSWER))


def _attention(name: str, action: str) -> Feature:
    def check(kind: str, patch: pytest.MonkeyPatch) -> None:
        routed = Routed(kind, action)
        with attention_of(routed.tiny, name):
            _answer(routed)

    return check


def _cache(name: str) -> Feature:
    def check(kind: str, patch: pytest.MonkeyPatch) -> None:
        offload_on_cpu(patch)
        routed = Routed(kind, attention="sdpa")
        _answer(routed, KINDS[name](routed.tiny.text.config))

    return check


def _later_turns(kind: str, patch: pytest.MonkeyPatch) -> None:
    """Text, a picture, text: what was deferred stays so."""
    routed, before, after = Routed(kind, attention="sdpa"), [3] * 5, [5, 6, 7]
    with routed.on(trace=True) as handle:
        logits = talk(handle, routed.tiny, routed.cache(), [[before], [ONE], [after]])[0]
        chosen = [stage.kept[0].tolist() for stage in handle.trace]
    routed.check(logits, routed.predict([*before, *ONE], after=tuple(after), chosen=chosen))


def _turns_that_choose_again(kind: str, patch: pytest.MonkeyPatch) -> None:
    """Each is a fresh prompt of the conversation."""
    routed, after = Routed(kind, attention="sdpa"), [5, 6, 7]
    with routed.on(reopens=True) as handle:
        logits = talk(handle, routed.tiny, routed.cache(), [[ONE], [after]])[0, len(ONE) :]
    routed.near(logits, routed.predict([*ONE, *after]).logits[len(ONE) :])


def _embeddings(kind: str, patch: pytest.MonkeyPatch) -> None:
    """No ids, and a mask of the visual tokens."""
    routed, states = Routed(kind, attention="sdpa"), []
    given = batch(routed.tiny, ONE, TWO)
    hook = routed.tiny.text.register_forward_pre_hook(
        lambda _, args, kwargs: states.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    routed.tiny.model(**given, use_cache=False)
    hook.remove()
    visual, mask = given.pop("input_ids") == PICTURE, given["attention_mask"]
    with routed.on() as handle, handle.using(handle.plan(visual_mask=visual, attention_mask=mask)):
        logits = routed.tiny.model(**given, inputs_embeds=states[0], use_cache=False).logits
    for b, ids in enumerate((ONE, TWO)):
        routed.check(logits[b], routed.predict(ids))


def _outputs(kind: str, patch: pytest.MonkeyPatch) -> None:
    """Hidden states of the logical length, without a cache; a loss, whose labels do not rank."""
    routed = Routed(kind, attention="sdpa")
    model, given, told = routed.tiny.model, batch(routed.tiny, ONE), batch(routed.tiny, [*ONE, *ANSWER])
    expected = routed.predict(ONE, after=ANSWER).logits
    labels = torch.tensor([[-100] * len(ONE) + list(ANSWER)])
    read: list[Tensor] = []
    head = next(module for name, module in model.named_modules() if name.endswith(("lm_head", "output_projection")))
    hook = head.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with routed.on() as handle:
        with handle.using(plan(handle, given)):
            output = model(**given, use_cache=False, output_hidden_states=True)
        hook.remove()
        with handle.using(plan(handle, told, labels=labels)):
            loss = model(**told, use_cache=False, labels=labels).loss
    assert {tuple(states.shape[:2]) for states in output.hidden_states} == {(1, len(ONE))}
    routed.near(output.logits[0], expected[: len(ONE)])
    routed.near(read[0] / read[0].norm(), output.hidden_states[-1] / output.hidden_states[-1].norm())  # some are scaled
    routed.near(loss, cross_entropy(expected[len(ONE) - 1 : -1], torch.tensor(ANSWER)))


def _moved_rows(kind: str, patch: pytest.MonkeyPatch) -> None:
    """The samples of a cache change places, as beams do."""
    routed, order = Routed(kind, attention="sdpa"), torch.tensor([1, 0])
    given, cache = batch(routed.tiny, ONE, TWO), routed.cache()
    with routed.on() as handle:
        with handle.using(plan(handle, given)):
            routed.tiny.model(**given, **{CACHE: cache}, use_cache=True)
        cache.reorder_cache(order)
        moved = {name: value.index_select(value.ndim - 2, order) for name, value in given.items()}
        logits = routed.tiny.model(**step(routed.tiny, moved, 7, cache), use_cache=True).logits
    for row, b in zip(logits, order.tolist(), strict=True):
        routed.near(row, routed.predict((ONE, TWO)[b], after=(7,)).logits[-1:])


def _tokens_taken_back(kind: str, patch: pytest.MonkeyPatch) -> None:
    """Those that were not accepted leave the cache, as in assisted decoding."""
    routed = Routed(kind, attention="sdpa")
    given, cache = batch(routed.tiny, ONE), routed.cache()
    if hasattr(cache, "activate_past_recording"):
        cache.activate_past_recording()
    with routed.on() as handle:
        with handle.using(plan(handle, given)):
            routed.tiny.model(**given, **{CACHE: cache}, use_cache=True)
        for tokens in ([7, 11, 13], [17]):
            past = int(cache.get_seq_length())
            positions = routed.tiny.spread(torch.arange(past, past + len(tokens))[None])
            inputs = {"input_ids": torch.tensor([tokens]), "position_ids": positions, CACHE: cache}
            mask = torch.ones(1, past + len(tokens), dtype=torch.long)
            logits = routed.tiny.model(**inputs, attention_mask=mask, use_cache=True).logits
            if len(tokens) > 1:
                cache.crop(-2)
    routed.near(logits[0], routed.predict(ONE, after=(7, 17)).logits[-1:])


FEATURES: dict[str, Feature] = {
    "eager": _attention("eager", "route"),
    "eager, removing": _attention("eager", "remove"),
    "sdpa": _attention("sdpa", "route"),
    "sdpa, removing": _attention("sdpa", "remove"),
    "flash": _attention(FLASH, "route"),
    "flex": _attention(FLEX, "route"),
    **{f"{name} cache": _cache(name) for name in KINDS},
    "later turns": _later_turns,
    "turns that choose again": _turns_that_choose_again,
    "embeddings": _embeddings,
    "outputs": _outputs,
    "moved rows": _moved_rows,
    "tokens taken back": _tokens_taken_back,
}
"""Each by its name, called with a type."""
