"""Models that something is done to: what they must still compute, and how they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import Sample, Tiny
from oracle import predict
from support import FEW, close, enable, generate, new_tokens, same_decisions, snapshot

import reroute
from reroute.errors import RerouteError, UnsupportedModelError


def decoder(tiny: Tiny) -> Any:
    return tiny.model.model.language_model


def prompt(tiny: Tiny) -> Sample:
    return tiny.prompt(0, 5, tiny.grid, 4)


def check(tiny: Tiny, handle: Any) -> None:
    """A prompt and what is generated after it are those of the oracle."""
    sample = prompt(tiny)
    output = generate(tiny, [sample], 3)
    same_decisions(handle.trace, [predict(tiny, sample, FEW)])
    expected = predict(tiny, sample, FEW, then=new_tokens(output, len(sample))[:-1])
    close(torch.stack(output.logits)[:, 0], expected.logits[len(sample) - 1 :])


def not_enabled(tiny: Tiny, message: str) -> None:
    before = snapshot(tiny.model)
    with pytest.raises(UnsupportedModelError, match=message):
        enable(tiny, FEW)
    assert snapshot(tiny.model) == before
    assert reroute.handle_of(tiny.model) is None


@contextmanager
def refused(tiny: Tiny, message: str) -> Iterator[None]:
    """What changes inside is refused by the next calls, and routing goes on once it is undone."""
    given = {**tiny.inputs([prompt(tiny)]), "use_cache": False}
    with enable(tiny, FEW) as handle:
        check(tiny, handle)
        count = handle.totals().prefills
        yield
        for call in (tiny.model, tiny.model.model):
            with pytest.raises(RerouteError, match=message):
                call(**given)
        assert handle.totals().prefills == count
