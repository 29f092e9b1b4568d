"""Calls in threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from models import Tiny
from torch import Tensor


def together(runs: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each of ``runs`` gives, in a thread of its own that begins with the others, or the exception it raises."""
    barrier, results = threading.Barrier(len(runs)), [None] * len(runs)

    def call(number: int) -> None:
        barrier.wait()
        try:
            results[number] = runs[number]()
        except BaseException as error:
            results[number] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def logits_of(tiny: Tiny, given: dict[str, Tensor]) -> Any:
    return tiny.model(**given).logits


def all_equal(results: Sequence[Any], expected: Tensor) -> None:
    for result in results:
        assert isinstance(result, Tensor), repr(result)
        assert torch.equal(result, expected)
