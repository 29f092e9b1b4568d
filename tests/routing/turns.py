"""A first call with a cache, and turns that follow it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from models import CACHE, Sample, Tiny
from oracle import Rules, predict
from support import cache_of, close
from torch import Tensor


def first(tiny: Tiny, samples: Sequence[Sample], side: str = "left") -> Any:
    return cache_of(tiny.model(**tiny.inputs(samples, side, positions=True), use_cache=True))


def turn(tiny: Tiny, cache: Any, before: Sequence[Sample], new: Sequence[Sample], side: str = "left") -> Tensor:
    """Logits of ``new`` after ``before``, which are in ``cache`` as one batch."""
    logits: Tensor = tiny.model(**tiny.follow(before, new, side), **{CACHE: cache}).logits
    return logits


def is_fresh(logits: Tensor, tiny: Tiny, said: Sample, new: Sample, rules: Rules) -> None:
    close(logits, predict(tiny, said + new, rules).logits[-len(new) :])
