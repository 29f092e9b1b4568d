"""Worker threads that end inside a forward: time limits, ``SystemExit``, an interrupt. No hook runs for them again."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import Tiny
from oracle import predict
from support import RULES, close, enable, same_decisions

from reroute.rankers import RankInputs, ScoreRanker
from reroute_kernels import PagedPool


class TimeIsUp(BaseException):
    """As a server raises it into a worker."""


PAGE = 16


@pytest.fixture(autouse=True)
def _silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads die without a word, and what is garbage but in no cycle goes without the collector."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    gc.disable()
    yield
    gc.enable()


def pool_for(rows: int) -> PagedPool:
    """Room for one prompt of ``rows`` tokens and no more."""
    pages = -(-rows // PAGE)
    return PagedPool(64, torch.float32, "cpu", page_size=PAGE, max_bytes=pages * PAGE * 64 * 4)


def die(work: Callable[[], Any]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("where", "error"),
    [(1, TimeIsUp), (2, KeyboardInterrupt), (5, TimeIsUp), (5, SystemExit), (5, RuntimeError), ("norm", TimeIsUp)],
)
def test_rows_of_threads_that_end_in_a_forward_come_back(tiny: Tiny, where: Any, error: type[BaseException]) -> None:
    def stop(*_: Any) -> None:
        raise error

    generate = functools.partial(tiny.model.generate, max_new_tokens=2)
    sample = tiny.prompt(0, 4, tiny.grid, 3)
    text, pool, inputs = tiny.model.model.language_model, pool_for(len(sample)), tiny.inputs([sample])
    with enable(tiny, RULES[0], pool=pool) as handle:
        hook = (text.norm if where == "norm" else text.layers[where]).register_forward_pre_hook(stop)
        for call in (tiny.model, generate, tiny.model):
            die(functools.partial(call, **inputs))
            assert (pool.stats().leases, pool.stats().pages_in_use) == (0, 0)
        hook.remove()
        expected = predict(tiny, sample, RULES[0])
        close(tiny.model(**inputs).logits[0], expected.logits)
        same_decisions(handle.trace, [expected])
    assert pool.stats().leases == 0


@dataclass(frozen=True)
class Interrupted(ScoreRanker):
    def scores(self, inputs: RankInputs) -> list[torch.Tensor]:
        raise KeyboardInterrupt


def test_rows_of_threads_that_end_in_a_decision_come_back(tiny: Tiny) -> None:
    sample = tiny.prompt(0, 4, tiny.grid, 3)
    pool, inputs = pool_for(len(sample)), tiny.inputs([sample])
    with enable(tiny, RULES[0], pool=pool, ranker=Interrupted()):
        for _ in range(3):
            die(lambda: tiny.model(**inputs))
    assert (pool.stats().leases, pool.stats().pages_in_use) == (0, 0)
