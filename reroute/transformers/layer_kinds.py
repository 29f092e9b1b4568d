"""Which layers see everything, which slide and which keep a state, and what may be asked of each kind."""

from __future__ import annotations

from collections.abc import Iterable

from ..core.plan import Plan
from ..core.schedule import Schedule
from ..errors import RerouteError
from .adapters import ModelAdapter
from .attention import mask_format_of

__all__ = ["check_attention", "check_kinds", "check_turn"]


def check_kinds(adapter: ModelAdapter, schedule: Schedule, compact: range) -> None:
    """Check that each layer is of a kind that is known, and that those that decide see everything.

    Raises:
        RerouteError: names the layers, and those that may decide.
    """
    unknown = [index for index in compact if not adapter.is_known_kind(index)]
    if unknown:
        raise RerouteError(
            f"Layers {unknown} use sliding-window attention, or another that is neither full nor sliding, and the "
            "configuration and what their attention is told do not agree on one of the two. Route a model (or "
            f"configure this one) with known attention in every layer from layer {compact[0]} on."
        )
    columns = list(zip(schedule.layers, schedule.rankers, strict=True))
    wrong = [layer for layer, ranker in columns if not adapter.may_decide(layer, ranker)]
    if wrong:
        layers = range(len(adapter.layers))
        free = [i for i in layers if any(adapter.may_decide(i, ranker) for _, ranker in columns)]
        choice = (
            f"Decide before some of the layers {free}, or give method= and keep=, which choose them."
            if free
            else "Choose another ranker, or configure the model with full attention in more layers."
        )
        raise RerouteError(
            f"No decision can be made before layers {wrong}: what ranks it sees a sliding window only, or a state, and "
            f"not all visual tokens. {choice}"
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
        RerouteError: fillers would come between the rows of an earlier turn and those of this one, and change states.
    """
    is_ragged = any(min(plan.active(stage)) < plan.width(stage) for stage in range(len(plan.decisions)))
    recurrent = [index for index in compact if adapter.is_recurrent(index)]
    if is_ragged and recurrent:
        raise RerouteError(
            f"Layers {recurrent} keep a state, and samples of this later turn keep different numbers of tokens: what "
            "fills the shorter ones would change it. Give each sample a call and a cache of its own."
        )
