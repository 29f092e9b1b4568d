"""Cache layers that keep a state instead of rows, in a cache of which other layers lack some."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from transformers.cache_utils import LinearAttentionLayer

from ...errors import UnsupportedCacheError
from .layers import WITHOUT_ROUTING, GuardedLayer

__all__ = ["GuardedRecurrentLayer", "StatePlace", "has_state", "states_in"]

StatePlace: TypeAlias = tuple[str, int]
"""Attribute of a layer and number: where it keeps a state."""


class GuardedRecurrentLayer(LinearAttentionLayer):
    """A layer with the state of the rows that it ran: lets only forwards that are adapted to that look at it.

    ``first``: the first layer with rows, if it comes behind this one. It knows what may be cropped.
    """

    first: GuardedLayer | None = None
    may_update = False

    def allow_update(self) -> None:
        """Let the forward that now runs read and write the state here."""
        self.may_update = True

    def forbid_update(self) -> None:
        """Undo ``allow_update``: the layer of the model has ended."""
        self.may_update = False

    @property
    def has_previous_state(self) -> dict[int, bool]:  # type: ignore[override]
        """What every forward asks before it goes on with a state.

        Raises:
            UnsupportedCacheError: in a forward without routing; nothing has changed then.
        """
        if not self.may_update:
            raise UnsupportedCacheError(WITHOUT_ROUTING)
        return _known(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest tokens, whose number is given with a minus sign as everywhere in Transformers.

        Raises:
            UnsupportedCacheError: visual tokens or what lies before them would go, or a state would have to go back.
        """
        if self.first is not None:
            self.first.check_crop(tokens_to_remove)
        if tokens_to_remove and any(self.is_recurrent_states_initialized.values()):
            raise UnsupportedCacheError(
                f"Cannot crop({tokens_to_remove}) a cache with recurrent states: they do not go back. Start a new "
                "cache for a shorter prompt."
            )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Become an ordinary empty layer again."""
        for name in ("first", "may_update"):
            self.__dict__.pop(name, None)
        self.__class__ = LinearAttentionLayer  # type: ignore[assignment]
        LinearAttentionLayer.reset(self)


def has_state(layer: Any) -> bool:
    """Whether any row has come to ``layer``."""
    return any(_known(layer).values())


def states_in(layer: Any) -> dict[StatePlace, torch.Tensor]:
    """What ``layer`` has memory for; it need not have come to a row yet."""
    kinds = ("conv_states", "recurrent_states")
    return {(kind, i): its for kind in kinds for i, its in getattr(layer, kind).items() if its is not None}


def _known(layer: Any) -> dict[int, bool]:
    known: dict[int, bool] = vars(layer)["has_previous_state"]
    return known
