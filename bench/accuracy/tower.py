"""The vision tower is a third of a short prefill, and sees the same pictures for every cell: run it once."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["Seen"]


class Seen:
    """What the vision tower of ``model`` made of batches of pictures."""

    def __init__(self, model: Any) -> None:
        """Nothing was seen yet."""
        self._tower = model.model.vision_tower
        self._outputs: dict[Any, Any] = {}

    @contextmanager
    def reused(self) -> Iterator[None]:
        """The tower returns what it returned for the same batch before.

        Not for rankers that look into the tower: they need it to run.
        """
        forward = self._tower.forward

        def remembered(pixel_values: torch.Tensor, **options: Any) -> Any:
            pixels = zlib.crc32(pixel_values.float().cpu().numpy().tobytes())
            key = (pixels, tuple(pixel_values.shape), repr(sorted(options.items())))
            if key not in self._outputs:
                self._outputs[key] = forward(pixel_values, **options)
            return self._outputs[key]

        self._tower.forward = remembered
        try:
            yield
        finally:
            del self._tower.forward  # that of the class is behind it
