"""Starting points that make a small language model learn to look things up quickly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from reroute.demo.tinyvlm import vocabulary as vocab
from reroute.demo.tinyvlm.scenes import PATCHES

from .packing import NO_CLASS, Batch

# The rotary frequencies that turn slowly over a prompt, so that equal query and key weights mean
# attention to equal content at any distance. The first few of a head's frequencies turn fast.
FAST_FREQUENCIES: Final = 6


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    orthogonal: Tensor = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    return orthogonal


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


@torch.no_grad()
def align_projector(
    model: LlavaForConditionalGeneration,
    draw: Callable[[int], Batch],
    generator: torch.Generator,
    batches: int = 24,
) -> float:
    """Set the projector by ridge regression; returns the error on two batches left out, 0 to 1.

    Patch features map to the sum of the embeddings of the words that describe the patch: class,
    colour and (rotated, so that they stay apart) the four location bins; for background, the
    texture. In closed form, what LLaVA's first training stage does by gradient descent.
    `draw(i)` makes batch i.
    """
    embedding = model.model.language_model.embed_tokens.weight
    rotations = [_orthogonal(embedding.shape[1], generator) for _ in range(4)]
    squares: Tensor | None = None
    for index in range(batches):
        features, target, weight = _regression(model, draw(index), embedding, rotations)
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


def _regression(
    model: LlavaForConditionalGeneration, batch: Batch, embedding: Tensor, rotations: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of all patches: float64 features and a one (n, C + 1), targets (n, C), weights (n, 1)."""
    hidden = model.model.vision_tower(batch.pixels, output_hidden_states=True).hidden_states[-1]
    features = hidden[:, 1:].flatten(0, 1)
    features = torch.cat([features, torch.ones(len(features), 1)], 1)
    label, colour = batch.patch_class.flatten(), batch.patch_colour.flatten()
    bins = batch.patch_bins.flatten(0, 1)
    described = _words(embedding, vocab.DIGITS, label) + _words(embedding, vocab.COLOURS, colour)
    for axis, rotation in enumerate(rotations):
        described = described + 0.7 * embedding[vocab.FIRST_LOCATION + bins[:, axis]] @ rotation
    texture = _words(embedding, vocab.TEXTURES, batch.texture.repeat_interleave(PATCHES))
    on_digit = (label < NO_CLASS)[:, None]
    target = torch.where(on_digit, described, texture)
    weight = torch.where(on_digit, 10.0, 1.0)
    return features.double(), target.double(), weight.double()


def _words(embedding: Tensor, names: Sequence[str], indices: Tensor) -> Tensor:
    """Embeddings (n, C) of the words that indices (n,) pick out of names."""
    # The background's class and colour are one past the end: any word does, it is masked later.
    return embedding[torch.tensor([*vocab.tokens(names), vocab.PAD])[indices]]


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
