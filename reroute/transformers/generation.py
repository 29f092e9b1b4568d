"""What ``generate`` knows and its forwards do not: where the prompt ends, which later tokens must not rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

from ..core.plan import visual_mask
from ..errors import RerouteError
from .cache import cache_of, past_length
from .prompt import has_picture

if TYPE_CHECKING:
    from .router import Router

__all__ = ["PROMPT_END", "generating", "prompt_end"]

PROMPT_END = "reroute_prompt_end"
"""The keyword argument in which a forward of ``generate`` is told where the prompt ends."""

_generations: ContextVar[tuple[tuple[Router, int | None], ...]] = ContextVar("reroute_generations", default=())


@contextmanager
def generating(router: Router, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """A ``model.generate(*args, **kwargs)``, from its beginning to its end.

    Raises:
        RerouteError: it would split a prompt with visual tokens into chunks.
    """
    ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    _refuse_chunks(router, (config, model.generation_config), kwargs, ids)
    end = None if ids is None else _prompt_end(ids, kwargs)
    outer = _generations.get()
    try:
        _generations.set((*outer, (router, end)))
        yield
    finally:
        _generations.set(outer)


def prompt_end(router: Router) -> int | None:
    """One past the last prompt token of the innermost ``generate`` of this model that runs here, if one does."""
    return next((end for owner, end in reversed(_generations.get()) if owner is router), None)


def _refuse_chunks(router: Router, configs: Any, kwargs: Mapping[str, Any], ids: torch.Tensor | None) -> None:
    sizes = [getattr(config, "prefill_chunk_size", None) for config in configs]
    # As in Transformers: a keyword wins, None included; then whatever is set first.
    size = kwargs.get("prefill_chunk_size", next(filter(None, sizes), None))
    if not size or ids is None or not has_picture(kwargs) or router.settings.keeps_all:
        return
    marks = router.adapter.marks
    if marks is not None or bool(visual_mask(ids.cpu().numpy(), router.adapter.visual_ids).any()):
        raise RerouteError(
            "Chunked prefill cannot be routed: the question must be known when visual tokens are ranked. "
            "Call generate with prefill_chunk_size=None (routing already makes long prompts cheaper), or disable "
            "routing."
        )


def _prompt_end(ids: torch.Tensor, kwargs: Mapping[str, Any]) -> int:
    """One past the logical position of the last token of ``ids`` (B, L), for which ``generate`` is called."""
    mask = kwargs.get("attention_mask")
    # Transformers' rule: under a mask of another length, ids are only the tokens that follow the cache.
    is_whole = mask is None or mask.shape[1] == ids.shape[1]
    return ids.shape[1] + (0 if is_whole else past_length(cache_of(kwargs)))
