"""A forward: one call of the base model, from the moment its ids are known. It is found by that call alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from transformers.cache_utils import Cache

from ..errors import RerouteError
from ..graphs import GraphUse
from .adapters import ModelAdapter
from .attention import MadeMask, MaskFormat, mask_format_of
from .cache import GuardedLayer, GuardedRecurrentLayer, RoutedLayer, allow_updates, guarded_layer, length_of, tear
from .vision import Recording

__all__ = ["FORWARD", "ForwardContext", "Kwargs"]

Kwargs = dict[str, Any]

FORWARD = "reroute_forward"
"""The keyword argument in which a decoder hands the forward to its layers."""


class ForwardContext:
    """One forward of the base model, seen from its decoder and its layers.

    - ``recording``: what its rankers read of the vision tower, until the last of them has decided.
    - ``is_idle``: whether all layers that follow run as they are, and need not ask.
    - ``made_mask``: of what ``generate`` made its mask, if it did and the plan knows of that.
    - ``asks_eager``: why it is not replayed, if its call is known to be none that could be.
    - ``graph``: says whether it was, where graphs are on; ``rows``: those of the class of the graph that served it.
    """

    recording: Recording | None = None
    is_idle = False
    made_mask: MadeMask | None = None
    asks_eager: str = ""
    graph: Callable[[], GraphUse] | None = None
    rows: tuple[int, ...] = ()

    def __init__(self, adapter: ModelAdapter, shape: tuple[int, int]) -> None:
        """``shape`` (B, L): tokens of the call. ``keep`` names the cache that its caller has, if it has one."""
        self._adapter, self._shape = adapter, shape
        self._is_claimed = self._is_running = False
        self._has_begun = False
        self._writable: GuardedLayer | GuardedRecurrentLayer | None = None
        self._may_store: tuple[Cache, int] | None = None
        self._kept: tuple[Cache, Any] | None = None

    @cached_property
    def _mask_format(self) -> MaskFormat:
        """Of the present attention, which the planner has checked; a dense prefill may have any."""
        return mask_format_of(self._adapter.text_config)

    def keep(self, cache: Cache | None) -> None:
        """The caller has ``cache``, whatever becomes of the call."""
        self._kept = None if cache is None else (cache, length_of(cache))

    def is_of(self, adapter: ModelAdapter) -> bool:
        """Whether it is one of the model of ``adapter``."""
        return self._adapter is adapter

    def claim(self, decoder: Any, args: tuple[Any, ...], kwargs: Kwargs) -> bool:
        """Whether this call of ``decoder`` is the one that the base model makes.

        Other calls may come before it and inside of it: of the decoder alone, or of another model. Not if the base
        model is the decoder, or has it embed the ids.

        Raises:
            RerouteError: it might be, but so might one before that has ended.
        """
        embeds = None if args or kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        has_embeds = self._adapter.decoder_embeds or (embeds is not None and embeds.shape[:2] == self._shape)
        may_be_own = decoder is self._adapter.text and has_embeds
        if not may_be_own or self._is_running:
            return False
        if self._is_claimed:
            raise RerouteError(
                "The decoder was called twice in one forward of its base model, with embeddings of one shape, and it "
                "is not known which call is the forward's. Call it before or after the forward, or give it input_ids."
            )
        self._is_claimed = self._is_running = True
        return True

    def before_layer(self, index: int, hidden: torch.Tensor, kwargs: Kwargs) -> torch.Tensor:
        """The input (B, S, C) of layer ``index`` instead of ``hidden``; its keyword arguments are changed in place."""
        return hidden

    def after_layer(self, index: int, output: torch.Tensor) -> torch.Tensor:
        """What the decoder gets instead of ``output`` (B, S, C) of layer ``index``."""
        self.forbid_update()
        return output

    def after_decoder(self, output: Any) -> Any:
        """What the base model gets instead of the decoder's ``output``."""
        self._is_running = False
        return output

    def finish(self) -> None:
        """The call has succeeded."""
        self._kept = None

    def abandon(self) -> None:
        """The call has failed."""
        if self._kept is not None:
            tear(*self._kept, has_begun=self._has_begun)

    def close(self) -> None:
        """The call has ended, in whatever way. Idempotent."""
        self.forbid_update()  # it may have failed before its layer stored anything
        if self._may_store is not None:
            allow_updates(*self._may_store, False)
            self._may_store = None

    def forbid_update(self) -> None:
        """Undo what the last layer was allowed: it has ended."""
        if self._writable is not None:
            self._writable.forbid_update()

    def _allow_updates(self, cache: Cache | None, first: int) -> None:
        """Let all layers from ``first`` on store the tokens of this forward."""
        if cache is not None:
            self._has_begun = True
            self._may_store = cache, first
            allow_updates(cache, first, True)

    def _allow_update(self, cache: Cache | None, index: int) -> RoutedLayer | None:
        """Let layer ``index`` store the tokens of this forward; returns the layer if it lacks rows of earlier ones."""
        self._has_begun = True
        self._writable = layer = guarded_layer(cache, index)
        if layer is not None:
            layer.allow_update()
        return layer if layer is not None and isinstance(layer, RoutedLayer) else None
