"""The tower of Qwen2.5-VL: no CLS, 2 x 2 patches to a visual token, and windows, in whose order patches run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from reroute_kernels.upload import upload

from ...rankers.vision import Grid, TowerShape
from .base import Tower, TowerRun

__all__ = ["Qwen25VLTower"]

LOGITS = 1 << 24
"""Logits that are held at once while attention is summed."""


class Qwen25VLTower(Tower):
    """``Qwen2_5_VisionTransformerPretrainedModel``; its projector is the patch merger."""

    module_types = ("Qwen2_5_VisionTransformerPretrainedModel",)

    @property
    def shape(self) -> TowerShape:
        """See ``Tower``."""
        vision = self.config.vision_config
        return TowerShape(
            num_layers=len(self.layers),
            hidden=vision.hidden_size,
            heads=vision.num_heads,
            has_cls=False,
            patches_per_token=self._merged,
            full_attention=tuple(i for i in range(len(self.layers)) if i in self.module.fullatt_block_indexes),
            features=(len(self.layers),),
            projector=self._projector_size,
        )

    def images(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[list[Grid]]:
        """See ``Tower``. The tower reads its grids on the host too."""
        grids = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        merge = self.config.vision_config.spatial_merge_size
        return [[(rows // merge, columns // merge)] * frames for frames, rows, columns in grids.tolist()]

    def check_call(self, call: Mapping[str, Any]) -> None:
        """See ``Tower``: calls have no say."""

    def tokens(self, run: TowerRun, index: int, *, as_run: bool) -> torch.Tensor:
        """See ``Tower``."""
        states = run.states[index]
        tokens = states.reshape(-1, self._merged * states.shape[-1])
        return tokens if as_run else self._by_rows(run, tokens)

    def attention(self, run: TowerRun, layer: int) -> torch.Tensor:
        """See ``Tower``. As the layer's eager attention computes it, of some queries at a time."""
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

        assert run.rope is not None
        query, keys = self._projected(run, layer)
        query, keys = (x.transpose(0, 1) for x in apply_rotary_pos_emb_vision(query, keys, *run.rope))  # (H, P, D)
        scale, lengths = self.layers[layer].attn.scaling, self._sequences(run, layer)
        received = [
            _received(*both, scale) for both in zip(query.split(lengths, 1), keys.split(lengths, 1), strict=True)
        ]
        patches = torch.cat(received).view(-1, self._merged)
        return self._by_rows(run, patches.mean(1))[None]

    def keys(self, run: TowerRun, layer: int) -> torch.Tensor:
        """See ``Tower``."""
        keys = self._projected(run, layer)[1]
        return self._by_rows(run, keys.unflatten(0, (-1, self._merged)).mean(1))

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """See ``Tower``."""
        return super().project(features.reshape(-1, self.config.vision_config.hidden_size))

    @property
    def _merged(self) -> int:
        """Patches of a token, which run one after the other."""
        return int(self.config.vision_config.spatial_merge_size) ** 2

    def _layers(self) -> Sequence[Any]:
        layers: Sequence[Any] = self.module.blocks
        return layers

    def _projected(self, run: TowerRun, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys (P, H, D) of all patches as they run, before the rotation."""
        block = self.layers[layer]
        projected = block.attn.qkv(block.norm1(run.states[layer]))
        query, keys, _ = projected.unflatten(-1, (3, block.attn.num_heads, -1)).unbind(1)
        return query, keys

    # --- windows ----------------------------------------------------------------------------------------------------

    def _by_rows(self, run: TowerRun, tokens: torch.Tensor) -> torch.Tensor:
        """``tokens`` (N, …) of a run, row by row of each image instead of window by window."""
        if run.places is None:
            orders, start = [], 0
            for grid in _frames(run):
                order, _ = self._windows(grid)
                orders.append(np.argsort(order) + start)
                start += len(order)
            run.places = upload(np.concatenate(orders), tokens.device)
        return tokens.index_select(0, run.places)

    def _sequences(self, run: TowerRun, layer: int) -> list[int]:
        """How many patches attend to each other in ``layer``, one after the other."""
        if layer in self.module.fullatt_block_indexes:
            sizes = [rows * columns for rows, columns in _frames(run)]
        else:
            sizes = [size for grid in _frames(run) for size in self._windows(grid)[1]]
        return [size * self._merged for size in sizes]

    def _windows(self, grid: Grid) -> tuple[NDArray[np.int64], list[int]]:
        """Of the tokens of a frame: their numbers in the order in which they run, and how many are in each window."""
        vision = self.config.vision_config
        side = vision.window_size // vision.spatial_merge_size // vision.patch_size
        row, column = np.indices(grid) // side
        window = (row * grid[1] + column).ravel()
        _, sizes = np.unique(window, return_counts=True)
        return np.argsort(window, kind="stable"), sizes.tolist()


def _received(query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """What each of P patches gets of the attention of all, mean over heads: ``query`` and ``keys`` are (H, P, D)."""
    heads, patches, _ = query.shape
    total = torch.zeros(patches, device=query.device)
    for some in query.split(max(1, LOGITS // (heads * patches)), 1):
        weights = (some @ keys.transpose(1, 2) * scale).softmax(-1, dtype=torch.float32).to(query.dtype)
        total += weights.mean(0).float().sum(0)
    return total.to(query.dtype)


def _frames(run: TowerRun) -> Iterator[Grid]:
    return (grid for frames in run.images for grid in frames)
