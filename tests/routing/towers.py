"""What the vision towers of tiny models compute, by Transformers' own eager attention; a ranker that looks at them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from models import Sample, Tiny
from oracle import Rules
from torch import Tensor
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl

from reroute.rankers import RankInputs, ScoreRanker, TowerShape, Vision

UNROLLED = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
"""Where the tokens of a picture of 4 x 4, row by row, are among those that run in windows of 2 x 2."""

RULES = Rules((0, 3), (0.5, 0.25))


@dataclass(frozen=True)
class Looking(ScoreRanker):
    """Ranks by the attention of the tower, after ``look`` has had its turn."""

    needs_vision: ClassVar[bool] = True
    look: Callable[[Vision], None] | None = field(default=None, compare=False)
    asks_for: tuple[int, ...] | None = None

    def tower_states(self, tower: TowerShape) -> tuple[int, ...]:
        return tuple(range(tower.num_layers + 1)) if self.asks_for is None else self.asks_for

    def scores(self, inputs: RankInputs) -> list[Tensor]:
        if self.look is not None:
            self.look(inputs.vision)
        attention = inputs.vision.attention(0)
        return [its.sum(0)[index].float() for its, index in zip(attention, inputs.visual_indices, strict=True)]


def tower_of(tiny: Tiny) -> Any:
    return tiny.model.model.visual if tiny.is_qwen else tiny.model.model.vision_tower


def layers_of(tiny: Tiny) -> Any:
    return tower_of(tiny).blocks if tiny.is_qwen else tower_of(tiny).encoder.layers


def outputs_of_tower(tiny: Tiny, sample: Sample) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Of each picture, by eager attention: hidden states (N, F) of its tokens, and what layers attend to, (…, N)."""
    tiny.model.set_attn_implementation("eager")
    try:
        tower = tower_of(tiny)
        if tiny.is_qwen:
            return [of_qwen(tower, *its) for its in zip(sample.pixels, sample.grids, strict=True)]
        return [of_clip(tower, pixels) for pixels in sample.pixels]
    finally:
        tiny.model.set_attn_implementation("sdpa")


def of_clip(tower: Any, pixels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    out = tower(pixels, output_hidden_states=True, output_attentions=True)
    return [state[0, 1:] for state in out.hidden_states], [weights[0, :, 0, 1:] for weights in out.attentions]


def of_qwen(tower: Any, pixels: Tensor, grid: tuple[int, int, int]) -> tuple[list[Tensor], list[Tensor]]:
    """Attention as the model's own function has it, window by window."""
    seen: list[Tensor] = []
    original = qwen2_5_vl.eager_attention_forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        seen.append(output[1][0])
        return output

    qwen2_5_vl.eager_attention_forward = watched
    try:
        states = tower(pixels, grid_thw=torch.tensor([grid]), output_hidden_states=True).hidden_states
    finally:
        qwen2_5_vl.eager_attention_forward = original
    rows, columns = grid[1] // 2, grid[2] // 2
    run = [r * columns + c for r0 in range(0, rows, 2) for c0 in range(0, columns, 2) for r, c in window(r0, c0, grid)]
    by_rows = torch.tensor(run).argsort()
    received: list[list[Tensor]] = [[]]
    for weights in seen:
        if sum(map(len, received[-1])) == len(pixels):
            received.append([])
        received[-1].append(weights.mean(0).sum(0))
    attended = [torch.cat(its).view(-1, 4).mean(1)[by_rows][None] for its in received]
    return [state.view(len(run), -1)[by_rows] for state in states], attended


def window(row: int, column: int, grid: tuple[int, int, int]) -> Iterator[tuple[int, int]]:
    """The tokens of a window of 2 x 2 tokens, fewer at the border."""
    for r in range(row, min(row + 2, grid[1] // 2)):
        for c in range(column, min(column + 2, grid[2] // 2)):
            yield r, c
