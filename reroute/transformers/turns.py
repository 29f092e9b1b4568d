"""Later turns that choose again: which calls are such turns, and what they choose from."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..config import Settings
from ..errors import RerouteError
from .cache import KeptStates, is_routed, past_length, states_of
from .prompt import Prompt

__all__ = ["chooses_again", "reopened_states", "with_earlier"]


def chooses_again(prompt: Prompt, settings: Settings) -> bool:
    """Whether this is a turn on a routed cache, neither a step nor a draft, and such turns choose again."""
    if not settings.config.reopens or settings.keeps_all or not is_routed(prompt.cache):
        return False
    return prompt.shape[1] > 1 if prompt.end is None else past_length(prompt.cache) < prompt.end


def reopened_states(prompt: Prompt, settings: Settings) -> KeptStates | None:
    """What the turn chooses again from, if it does.

    Raises:
        RerouteError: the cache does not have it.
    """
    if not chooses_again(prompt, settings):
        return None
    kept, first = states_of(prompt.cache), settings.schedule.first_look
    if kept is None or kept.layer != first:
        why = (
            "it lacks states of calls that ran without reopens=True, kept every visual token, or came as inputs_embeds"
            if kept is None
            else f"it keeps the states before layer {kept.layer}, and the schedule begins before layer {first}"
        )
        raise RerouteError(
            f"This cache was routed, and a later turn cannot choose again: {why}. Start a new cache, or call the model "
            "in handle.at(reopens=False) to go on with what was chosen."
        )
    return kept


def with_earlier(earlier: KeptStates, prompt: Prompt, is_visual: Any, valid: Any) -> tuple[Any, Any]:
    """``is_visual``, ``valid`` (B, L) behind those of the earlier tokens (B, T).

    Raises:
        RerouteError: the mask does not say which of the earlier tokens are padding, or there is some before them.
    """
    mask, new = prompt.mask, is_visual.shape[1]
    is_visual = np.concatenate([earlier.is_visual.cpu().numpy(), is_visual], 1)
    if valid is None or mask is None:
        known = np.ones((len(is_visual), earlier.count), dtype=bool)
        return is_visual, None if valid is None else np.concatenate([known, valid], 1)
    if mask.shape[1] != earlier.end + new:
        raise RerouteError(
            f"A later turn that chooses again needs an attention_mask of the whole conversation: {earlier.end} tokens "
            f"in the cache and {new} of this call, and it has {mask.shape[1]} columns. Give a call that goes on with a "
            "cache only its new tokens, and a mask of all."
        )
    known = mask.cpu().numpy().astype(bool)
    if not known[:, : earlier.start].all():
        raise RerouteError(
            "A later turn cannot choose again in a batch that began with padded text, before any picture. Put that "
            "text into the call of the first picture."
        )
    return is_visual, known[:, earlier.start :]
