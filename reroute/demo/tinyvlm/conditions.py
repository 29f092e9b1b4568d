"""Conditions under which questions are asked: as the model was trained, with noise on what it sees, in clutter."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from .digits import Split
from .examples import Example, examples

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

__all__ = ["CONDITIONS", "Condition", "noise"]


@dataclass(frozen=True)
class Condition:
    """What is made harder.

    `sigma` is that of gaussian noise on the visual tokens, as a share of their root mean square; `clutter` asks about
    fuller pictures. `about` is a phrase for the reader.
    """

    about: str
    sigma: float = 0.0
    clutter: bool = False

    def examples(self, split: Split, counts: Mapping[str, int], seed: int = 777) -> list[Example]:
        """See `examples.examples`. Noise is put on the same questions as those that are asked without any."""
        return examples(split, counts, seed, self.clutter)

    @contextmanager
    def on(self, model: LlavaForConditionalGeneration) -> Iterator[None]:
        """The model under this condition."""
        if not self.sigma:
            yield
            return
        with noise(model, self.sigma):
            yield


CONDITIONS: Final = {
    "clean": Condition("pictures as in training"),
    "noise-0.5": Condition("gaussian noise of sigma 0.5 rms on the visual tokens", sigma=0.5),
    "noise-1": Condition("gaussian noise of sigma 1 rms on the visual tokens", sigma=1.0),
    "clutter": Condition("pictures of 9 or 10 digits among 20 to 39 strokes", clutter=True),
}


@contextmanager
def noise(model: LlavaForConditionalGeneration, sigma: float, seed: int = 0) -> Iterator[None]:
    """Add gaussian noise to what the projector makes of a picture: `sigma` times the root mean square of its output.

    The noise of a picture follows from its pixels and `seed`, whatever else is in the batch, so that all ways to run
    the model answer the same questions. The vision tower is not disturbed: rankers that look at it see a clean picture.
    """
    pictures: list[int] = []

    def remember(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        pixels = named["pixel_values"] if "pixel_values" in named else arguments[0]
        pictures[:] = [zlib.crc32(picture.float().cpu().numpy().tobytes()) for picture in pixels]

    def disturb(module: Any, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        if output.ndim != 3:  # tokens of one picture that a ranker merged: noise of their own, of the same size
            return _disturbed(output, sigma, [seed, *pictures])
        rows = zip(output, pictures, strict=True)
        return torch.stack([_disturbed(row, sigma, [seed, picture]) for row, picture in rows])

    tower: Any = model.model.vision_tower
    projector: Any = model.model.multi_modal_projector
    hooks = [
        tower.register_forward_pre_hook(remember, with_kwargs=True),
        projector.register_forward_hook(disturb),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _disturbed(tokens: Tensor, sigma: float, seeds: list[int]) -> Tensor:
    """`tokens` (N, C) with noise."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(seeds).encode()))
    drawn = torch.randn(tokens.shape, generator=generator).to(tokens)
    return tokens + sigma * tokens.float().square().mean().sqrt().to(tokens.dtype) * drawn
