"""All processes of tensor parallelism enable routing, with the same settings, or none does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from ...errors import RerouteError
from .ranks import head_ranks

__all__ = ["enabled_together"]

Made = TypeVar("Made")


class _Word(NamedTuple):
    """What a process says: its settings, or why it cannot."""

    settings: str
    refusal: str = ""


def enabled_together(model: Any, make: Callable[[], Made], settings_of: Callable[[Made], str]) -> Made:
    """What ``make`` returns, once it has in every process that ``model`` is spread over, for the same settings.

    A process that refused would run other layers than those that wait for it, which would wait for ever.

    Raises:
        RerouteError: ``make`` failed in another one, or settings differ. What it raises in this one comes as it is.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return make()
    ranks = head_ranks(model)
    if ranks is None:
        return make()
    try:
        made = make()
    except Exception as error:  # whatever it is, the others wait for a word
        _words(ranks.group, ranks.size, _Word("", str(error) or type(error).__name__))
        raise
    words = _words(ranks.group, ranks.size, _Word(settings_of(made)))
    refused = next(((rank, word.refusal) for rank, word in enumerate(words) if word.refusal), None)
    if refused is not None:
        raise RerouteError(
            f"Process {refused[0]} of the tensor-parallel group cannot route the model, so none does: {refused[1]}"
        )
    if len(set(words)) > 1:
        said = "; ".join(f"process {rank}: {word.settings}" for rank, word in enumerate(words))
        raise RerouteError(f"All processes of tensor parallelism must enable routing with the same settings. {said}.")
    return made


def _words(group: Any, size: int, own: _Word) -> list[_Word]:
    words: list[Any] = [None] * size
    dist.all_gather_object(words, own, group=group)
    return words
