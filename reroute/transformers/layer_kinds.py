"""Which layers see everything, which slide and which keep a state, and what may be asked of each kind."""

from __future__ import annotations

from collections.abc import Iterable

from ..core.plan import Plan
from ..core.schedule import Schedule
from ..errors import RerouteError
from .adapters import ModelAdapter
from .attention import mask_format_of

__all__ = ["attended_layers", "check_attention", "check_kinds", "check_prompt", "check_turn"]


def attended_layers(schedule: Schedule) -> set[int]:
    """The layers that rankers of ``schedule`` ask how they attend."""
    columns = [(layer + its.layer_offset, (its,)) for layer, its in zip(schedule.layers, schedule.rankers, strict=True)]
    return {layer for layer, its in (*columns, *schedule.looks.items()) if any(one.needs_attention for one in its)}


def check_kinds(adapter: ModelAdapter, schedule: Schedule, compact: range) -> None:
    """Check that each layer is of a kind that is known, and that rankers can decide where they shall.

    Raises:
        RerouteError: names the layers, and those that may decide.
    """
    unknown = [index for index in compact if not adapter.is_known_kind(index)]
    if unknown:
        raise RerouteError(
            f"Layers {unknown} use sliding-window attention, or another that is neither full nor sliding nor chunked, "
            "and the configuration and what the layers are told do not agree on one of them. Route a model (or "
            f"configure this one) with known attention in every layer from layer {compact[0]} on."
        )
    columns = list(zip(schedule.layers, schedule.rankers, strict=True))
    wrong = [layer for layer, ranker in columns if not adapter.can_decide(layer, ranker)]
    if wrong:
        layers = range(len(adapter.layers))
        free = [i for i in layers if any(adapter.can_decide(i, ranker) for _, ranker in columns)]
        choice = (
            f"Decide before some of the layers {free}, or give method= and keep=, which choose them."
            if free
            else "Choose another ranker, or configure the model with attention in more layers."
        )
        raise RerouteError(
            f"No decision can be made before layers {wrong}: what ranks it would look at a layer that keeps a state "
            f"and does not attend, or that is not there. {choice}"
        )


def check_prompt(adapter: ModelAdapter, plan: Plan, compact: Iterable[int]) -> None:
    """Check that layers treat this prompt as routing has to: those that rank see all of it, and none counts its rows.

    Raises:
        RerouteError: it is too long for one of them; names the layers.
    """
    end = plan.past + plan.length
    blind = [i for i in sorted(attended_layers(plan.schedule)) if not adapter.sees_all(i, plan.past, end)]
    if blind:
        full = [i for i in range(len(adapter.layers)) if adapter.is_known_kind(i) and adapter.is_full_attention(i)]
        instead = f"Rank by layers that see everything ({full})" if full else "Choose rankers that need no attention"
        raise RerouteError(
            f"The prompt is longer than what the last token sees in layers {blind}, whose attention ranks visual "
            f"tokens: {plan.length} tokens, {plan.past} before them. {instead}, or run this call in "
            "handle.at(keep=1.0)."
        )
    counted = {i: counts for i in compact if (counts := adapter.counts_from(i)) is not None and end > counts}
    if counted:
        raise RerouteError(
            f"Layers {sorted(counted)} scale queries by the number of rows that are present, from position "
            f"{min(counted.values())} on, and routing leaves rows out: this call reaches position {end - 1}. Shorten "
            "the prompt, or run the call in handle.at(keep=1.0)."
        )


def check_attention(adapter: ModelAdapter, compact: Iterable[int]) -> None:
    """Check that the attention as it is now can be routed in the layers that run ``compact``.

    Raises:
        RerouteError: its masks are not known, or it counts a window in rows.
    """
    if mask_format_of(adapter.text_config) != "padding":
        return
    sliding = [index for index in compact if adapter.slides(index)]
    if sliding:
        raise RerouteError(
            f"Flash attention counts the window of layers {sliding} in rows, and routing leaves rows out. Call "
            "model.set_attn_implementation('sdpa')."
        )


def check_turn(adapter: ModelAdapter, plan: Plan, compact: Iterable[int]) -> None:
    """Check that the layers that run ``compact`` can take up a later turn.

    Raises:
        RerouteError: they see a window of later turns only; or fillers would come between the rows of an earlier turn
            and those of this one, and change states.
    """
    windowed = [index for index in compact if adapter.keeps_prompt(index)]
    if windowed:
        raise RerouteError(
            f"Layers {windowed} see a window of all that comes after the first prompt, and so of later pictures. Start "
            "a new cache for a prompt with other pictures, or run the turn in handle.at(keep=1.0)."
        )
    is_ragged = any(min(plan.active(stage)) < plan.width(stage) for stage in range(len(plan.decisions)))
    recurrent = [index for index in compact if adapter.is_recurrent(index)]
    if is_ragged and recurrent:
        raise RerouteError(
            f"Layers {recurrent} keep a state, and samples of this later turn keep different numbers of tokens: what "
            "fills the shorter ones would change it. Give each sample a call and a cache of its own."
        )
