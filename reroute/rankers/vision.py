"""What a ranker may ask about the pictures: where each visual token lies, and what the vision tower made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias, cast

import torch

from ..errors import RerouteError

__all__ = ["UNSEEN", "Grid", "TowerShape", "Vision"]

Grid: TypeAlias = tuple[int, int]
"""Rows and columns of the visual tokens of one image."""


@dataclass(frozen=True)
class TowerShape:
    """The sizes of a vision tower, and of the projector that makes visual tokens of its patches.

    - ``num_layers``, ``hidden``, ``heads``: of the tower.
    - ``has_cls``: whether a CLS row attends to all patches of an image.
    - ``patches_per_token``: patches that the projector makes one visual token of.
    - ``full_attention``: the layers in which all patches of an image attend to each other.
    - ``features``: the hidden states that the projector reads, side by side, numbered from 0 as in
      ``Ranker.tower_states``.
    - ``projector``: multiply-adds of one visual token in the projector.
    """

    num_layers: int
    hidden: int
    heads: int
    has_cls: bool
    patches_per_token: int
    full_attention: tuple[int, ...]
    features: tuple[int, ...]
    projector: int

    @property
    def scored_layer(self) -> int:
        """The layer whose attention published methods rank by: the last one that the projector sees the output of."""
        return max(0, self.features[-1] - 1)

    def attention_flops(self, tokens: int) -> int:
        """FLOPs of ``Vision.attention`` of a layer with full attention, as if of one picture."""
        patches, width = tokens * self.patches_per_token, self.hidden
        if self.has_cls:
            return 2 * width * width * (patches + 1) + 2 * patches * width
        return 4 * patches * width * width + 2 * patches * patches * width


class Vision(Protocol):
    """The pictures of one call. Each list has an entry per sample, whose rows are its visual tokens in prompt order:
    image after image, row after row of an image. ``RankContext.visual_indices`` says which of them compete.

    Only hidden states that ``Ranker.tower_states`` named are there. Tensors are on the device of the index tensors.
    """

    @property
    def grids(self) -> list[list[Grid]]:
        """Of each image of each sample. A video counts as its frames."""

    @property
    def shape(self) -> TowerShape:
        """The tower's."""

    def states(self, index: int, *, as_run: bool = False) -> list[torch.Tensor]:
        """Hidden states (N_b, patches_per_token * hidden) of the tokens' patches, side by side.

        ``as_run``: each image in the order in which the tower runs its tokens, which with windows is not row by row.
        """

    def cls(self, index: int) -> list[torch.Tensor]:
        """Hidden states (images, hidden) of the CLS row of each image, of towers that have one."""

    def attention(self, layer: int) -> list[torch.Tensor]:
        """What the tower attends to in ``layer``, recomputed from its input, hidden state ``layer``.

        With a CLS row, the attention that it pays each token, (heads, N_b). Without, what each token receives from all
        patches of its image, mean over heads and over its own patches, (1, N_b). In the dtype of the tower.
        """

    def keys(self, layer: int) -> list[torch.Tensor]:
        """Keys (N_b, heads, head_dim) of ``layer`` before any rotation, from its input; mean over a token's patches."""

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """What the model's projector makes of ``features`` (n, patches_per_token * hidden of each state): (n, C)."""


class _Unseen:
    """What stands for the pictures before rankers that did not ask for them, and in notes."""

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Vision, name):
            raise AttributeError(name)
        raise RerouteError(
            f"A ranker asks for vision.{name} of pictures that it is not shown: set needs_vision = True in its class, "
            "and let tower_states name the hidden states of the vision tower that it reads. While it makes a note, no "
            "ranker is shown them."
        )


UNSEEN: Final = cast(Vision, _Unseen())
"""Pictures that are not shown: whatever is asked of them raises RerouteError."""
