"""The vision tower is a third of a short prefill, and sees the same pictures in every setup: run it once."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

from ..report import Setup

__all__ = ["Seen"]

MOST: Final = 12
"""Batches that are remembered; more would fill the memory."""


class Seen:
    """What the vision tower of a LLaVA ``model`` made of batches of pictures."""

    def __init__(self, model: Any) -> None:
        """Nothing was seen yet."""
        self._tower = model.model.vision_tower
        self._outputs: dict[Any, Any] = {}

    @contextmanager
    def reused(self, setup: Setup) -> Iterator[None]:
        """The tower returns what it returned for the same batch before, unless a ranker of ``setup`` looks into it."""
        if setup.schedule is not None and any(ranker.needs_vision for ranker in setup.schedule.rankers):
            yield
            return
        forward = self._tower.forward

        def remembered(pixel_values: torch.Tensor, **options: Any) -> Any:
            pixels = zlib.crc32(pixel_values.float().cpu().numpy().tobytes())
            key = (pixels, tuple(pixel_values.shape), repr(sorted(options.items())))
            if key in self._outputs:
                return self._outputs[key]
            made = forward(pixel_values, **options)
            if len(self._outputs) < MOST:
                self._outputs[key] = made
            return made

        self._tower.forward = remembered
        try:
            yield
        finally:
            del self._tower.forward  # that of the class is behind it
