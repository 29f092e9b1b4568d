"""Starting points that make a small language model learn to look things up quickly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from reroute.demo.tinyvlm import vocabulary as vocab
from reroute.demo.tinyvlm.scenes import GRID

# The rotary frequencies that turn slowly over a prompt, so that equal query and key weights mean
# attention to equal content at any distance. The first few of a head's frequencies turn fast.
FAST_FREQUENCIES: Final = 6


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    orthogonal: Tensor = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    return orthogonal


# A patch's row and column are cosines and sines of these frequencies, as far as the width has room for them.
POSITIONS: Final = tuple(math.pi / 2 * 0.75**i for i in range(8))
# Where the heads of the tower's layers look first, in (rows, columns); the next two layers begin anew.
NEIGHBOURS: Final = (((0, 1), (0, -1), (1, 0), (-1, 0)), ((1, 1), (1, -1), (-1, 1), (-1, -1)))


@torch.no_grad()
def local(model: LlavaForConditionalGeneration) -> None:
    """Initialise the vision tower so that each head attends to one neighbour of a patch, as a convolution would.

    Positions fill the first dimensions. Keys copy them, queries copy them turned by the way to the neighbour, both on
    top of a part of their random weights. Text about a whole image teaches only slowly what lies side by side.
    """
    tower: Any = model.model.vision_tower  # not annotated
    width, head = tower.config.hidden_size, tower.config.hidden_size // tower.config.num_attention_heads
    embeddings = tower.embeddings
    frequencies = torch.tensor(POSITIONS[: head // 4])
    count = 4 * len(frequencies)
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    angles = torch.stack([rows.flatten(), columns.flatten()], 1)[:, :, None] * frequencies  # (PATCHES, 2, F)
    waves = torch.cat([angles.cos(), angles.sin()], 2).flatten(1)  # (PATCHES, 4 F): row cos, sin; column cos, sin
    embeddings.position_embedding.weight.zero_()
    embeddings.position_embedding.weight[1:, :count] = waves
    embeddings.patch_embedding.weight.mul_(3.0)  # as large as the positions
    for index, layer in enumerate(tower.encoder.layers):
        attention = layer.self_attn
        for start, shift in zip(range(0, width, head), NEIGHBOURS[index % 2], strict=True):
            query, key = (part.weight[start : start + head] for part in (attention.q_proj, attention.k_proj))
            query.mul_(0.3)
            key.mul_(0.3)
            query[:count, :count] += 0.8 * _turn(frequencies, shift)
            key[:count, :count] += 0.8 * torch.eye(count)


def _turn(frequencies: Tensor, shift: tuple[int, int]) -> Tensor:
    """The matrix (4 F, 4 F) that moves positions by (rows, columns)."""
    blocks = []
    for distance in shift:
        cos, sin = (frequencies * distance).cos().diag(), (frequencies * distance).sin().diag()
        blocks.append(torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)]))
    turned: Tensor = torch.block_diag(*blocks)
    return turned


@torch.no_grad()
def mimetic(model: LlavaForConditionalGeneration, generator: torch.Generator) -> None:
    """Initialise attention to find and copy equal content (after Trockman and Kolter, 2023).

    Word embeddings have unit norm and equal the output layer's rows; queries and keys start
    equal where rotary positions hardly matter; the output projection starts as a weak inverse
    of the values.
    """
    language = model.model.language_model
    embedding = language.embed_tokens.weight
    words = F.normalize(torch.randn(embedding.shape, generator=generator), dim=1)
    embedding.copy_(words)
    model.lm_head.weight.copy_(words)
    width, head = embedding.shape[1], language.layers[0].self_attn.head_dim
    slow = torch.arange(width) % (head // 2) >= FAST_FREQUENCIES
    damping = torch.where(slow, 1.0, 0.3)[:, None]
    for layer in language.layers:
        attention = layer.self_attn
        query, key = _orthogonal(width, generator), _orthogonal(width, generator)
        key[slow] = query[slow]
        attention.q_proj.weight.copy_(damping * query)
        attention.k_proj.weight.copy_(damping * key)
        value = _orthogonal(width, generator)
        attention.v_proj.weight.copy_(value)
        attention.o_proj.weight.copy_(0.1 * value.T)


class WordSpace:
    """Sums of word embeddings that describe what an image shows, and where."""

    def __init__(self, embedding: Tensor, generator: torch.Generator) -> None:
        """`embedding` (V, C) of the language model. The four sides of a box are rotated, so that they stay apart."""
        self.embedding = embedding
        self.rotations = [_orthogonal(embedding.shape[1], generator) for _ in range(4)]

    def words(self, names: Sequence[str], indices: Tensor) -> Tensor:
        """Embeddings (n, C) of the words that indices (n,) pick out of names; one past the end is no word of them."""
        return self.embedding[torch.tensor([*vocab.tokens(names), vocab.PAD])[indices]]

    def placed(self, described: Tensor, bins: Tensor) -> Tensor:
        """Descriptions (n, C) with those of boxes added, given as location bins (n, 4)."""
        for side, rotation in enumerate(self.rotations):
            described = described + 0.7 * self.embedding[vocab.FIRST_LOCATION + bins[:, side]] @ rotation
        return described


# Features (n, C) of the tower, descriptions (n, C) that the projector should make of them, weights (n, 1).
Pairs = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def align_projector(
    model: LlavaForConditionalGeneration,
    pairs: Callable[[int, WordSpace], Pairs],
    generator: torch.Generator,
    batches: int = 24,
) -> float:
    """Set the projector by ridge regression; returns the error on two batches left out, 0 to 1.

    Features of the tower map to the sum of the embeddings of the words that describe them: class, colour, the four
    location bins; for background, the texture. In closed form, what LLaVA's first training stage does by gradient
    descent. `pairs(i, space)` makes batch i.
    """
    space = WordSpace(model.model.language_model.embed_tokens.weight, generator)
    squares: Tensor | None = None
    for index in range(batches):
        features, target, weight = (part.double() for part in pairs(index, space))
        features = torch.cat([features, torch.ones_like(weight)], 1)
        if index < batches - 2:
            products = (weight * features).T @ torch.cat([features, target], 1)
            squares = products if squares is None else squares + products
    assert squares is not None
    inputs = features.shape[1]
    gram, cross = squares[:, :inputs], squares[:, inputs:]
    ridge = 1e-3 * gram.diag().mean() * torch.eye(inputs, dtype=gram.dtype)
    solution = torch.linalg.solve(gram + ridge, cross)
    _set_linear(model.model.multi_modal_projector, solution)
    error = (weight * (features @ solution - target) ** 2).sum() / (weight * target**2).sum()
    return float(error)


def _set_linear(projector: torch.nn.Module, solution: Tensor) -> None:
    """Make the two-layer projector compute the affine map `solution` (C + 1, C).

    gelu(4 + x) is nearly 4 + x for small x, so the first layer maps into that range and the
    second one back.
    """
    scale, offset = 0.25, 4.0
    first, second = projector.linear_1, projector.linear_2
    assert isinstance(first, torch.nn.Linear)
    assert isinstance(second, torch.nn.Linear)
    first.weight.copy_(scale * solution[:-1].T)
    first.bias.copy_(scale * solution[-1] + offset)
    second.weight.copy_(torch.eye(len(second.weight)) / scale)
    second.bias.fill_(-offset / scale)
