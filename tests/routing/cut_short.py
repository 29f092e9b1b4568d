"""What ends calls early, and what must be as ever afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import CACHE, Sample, Tiny
from support import (
    FEW,
    enable,
    labels_after,
    small,
    state_of,
    unchanged,
)
from torch import Tensor, nn

from reroute.errors import UnsupportedCacheError


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


@functools.cache
def parts_of(family: str) -> Parts:
    return Parts(small(family))


@contextmanager
def in_call(module: nn.Module, number: int) -> Iterator[None]:
    """End the call ``number`` of ``module``."""
    left = [number]

    def hook(*_: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


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
